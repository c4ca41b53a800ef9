"""Data: every accepted format, and every bad file or row by its name and number."""

from __future__ import annotations

import pytest
from datasets import Dataset
from valid_recipe import VALID

from llmreg.errors import RecipeError
from llmreg.recipes import load_recipe
from llmreg.recipes.data import in_format, load_training_data, scoring_rows
from llmreg.recipes.sources import load_source

PAIRS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)]
GSM8K = [{"question": "How many?", "answer": "2 + 2 = 4\n#### 4"}]
CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_same_rows_come_from_jsonl_json_csv_parquet_and_a_folder(jsonl, tmp_path):
    rows = Dataset.from_list(PAIRS)
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(jsonl(PAIRS).read_text())
    (tmp_path / "folder").mkdir()
    jsonl(PAIRS, "folder/train.jsonl")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "rows.json", "folder"):
        assert load_source(str(tmp_path / name)).to_list() == PAIRS, name


def test_gsm8k_as_published_is_recognised():
    (row,) = in_format(Dataset.from_list(GSM8K)).to_list()
    assert row == {"prompt": "Question: How many?\nAnswer:", "completion": " 2 + 2 = 4\n#### 4"}


def test_columns_are_mapped_by_name_and_by_template():
    by_name = in_format(Dataset.from_list(GSM8K), {"prompt": "question", "completion": "answer"}).to_list()
    assert by_name == [{"prompt": "How many?", "completion": "2 + 2 = 4\n#### 4"}]
    template = in_format(Dataset.from_list(GSM8K), {"text": "{question} -> {answer}"}).to_list()
    assert template == [{"text": "How many? -> 2 + 2 = 4\n#### 4"}]


@pytest.mark.parametrize("rows", [PAIRS, CHAT, [{"text": "Once upon a time"}]], ids=["pairs", "chat", "text"])
def test_trl_formats_pass_unchanged_and_other_columns_are_left_out(rows):
    with_extra = [{**row, "source": "somewhere"} for row in rows]
    assert in_format(Dataset.from_list(with_extra)).to_list() == rows


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "question"}, "it must give one of: prompt and completion"),
        ({"prompt": "question", "completion": "answr"}, "names 'answr', but the data has the columns question, answer"),
        ({"text": "{question} {nothing}"}, "names 'nothing'"),
        ({"text": "{question"}, "which is not one"),
        ({"text": "{question.__class__}"}, "names 'question.__class__'"),
        ({"text": "{question!r}"}, "only plain column names may stand in braces"),
        ({"text": "{question:>10000000}"}, "only plain column names may stand in braces"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(columns, said):
    with pytest.raises(RecipeError) as caught:
        in_format(Dataset.from_list(GSM8K), columns)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": "x", "b": "y"}], "the columns a, b are in no known format"),
        ([{"prompt": "x", "chosen": "y", "rejected": "z"}], "these are rows for task dpo"),
        ([*PAIRS[:2], {"prompt": "x", "completion": None}], "row 3: column 'completion' is missing"),
        ([*PAIRS[:2], {"prompt": "x"}], "row 3: column 'completion' is missing"),
        ([{"text": "a"}, {"text": ""}], "row 2: column 'text' is empty"),
        ([{"prompt": 1, "completion": 2}], "row 1: column 'prompt' holds a number ('1'), but must hold text"),
        ([{"text": ["a"]}], "row 1: column 'text' holds a list"),
        ([*CHAT, {"messages": []}], "row 2: column 'messages' is an empty conversation"),
        ([{"messages": [{"speaker": "me", "says": "Hi"}]}], "row 1: column 'messages' holds a message without role"),
        ([{"messages": "Hi"}], "row 1: column 'messages' holds text ('Hi'), but must hold a list of messages"),
    ],
)
def test_a_wrong_format_is_named_with_the_row_number(jsonl, rows, said):
    with pytest.raises(RecipeError) as caught:
        in_format(load_source(str(jsonl(rows))))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        (["", "", ""], "has no rows"),
        ([*PAIRS[:3], '{"prompt": "x", "compl'], "row 4 is not valid JSON"),
        ([*PAIRS[:3], "[1, 2]"], "row 4 is not a mapping of columns"),
        (
            [*PAIRS[:3], {"prompt": ["x"], "completion": "y"}],
            "row 4: column 'prompt' holds a list, but row 1 holds text",
        ),
    ],
)
def test_a_damaged_file_is_named_with_the_row_number(jsonl, rows, said):
    with pytest.raises(RecipeError) as caught:
        in_format(load_source(str(jsonl(rows))))
    assert said in str(caught.value)


def test_a_damaged_parquet_file_is_one_clear_message(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(RecipeError, match=r"rows\.parquet cannot be read as data"):
        load_source(str(tmp_path / "rows.parquet"))


def test_a_hub_data_set_that_cannot_be_reached_is_one_clear_message(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"the data set nobody/nothing-at-all \(split train\) cannot be loaded"):
        load_source("nobody/nothing-at-all")


def test_an_error_of_the_data_names_its_place_in_the_recipe(recipe_file, jsonl):
    path = jsonl([{"prompt": "x", "completion": None}])
    recipe = load_recipe(recipe_file(VALID.replace("pocket/word-problems\n", f"{path}\n")))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:10: row 1: column 'completion' is missing"):
        load_training_data(recipe)


def test_rows_are_kept_back_by_the_seed(recipe_file, jsonl):
    path = jsonl(PAIRS)

    def split(seed):
        recipe = load_recipe(recipe_file(), [f"data.train={path}", "evaluation.heldout=5", f"seed={seed}"])
        data = load_training_data(recipe)
        return data.train.to_list(), data.heldout.to_list()

    train, heldout = split(0)
    assert len(heldout) == 5
    assert sorted((*train, *heldout), key=str) == sorted(PAIRS, key=str)
    assert split(0) == (train, heldout)
    assert split(1) != (train, heldout)


def test_more_rows_than_there_are_cannot_be_kept_back(recipe_file, jsonl):
    recipe = load_recipe(recipe_file(), [f"data.train={jsonl(PAIRS)}", "evaluation.heldout=20"])
    with pytest.raises(RecipeError, match="has only 20"):
        load_training_data(recipe)


def test_what_is_scored_is_limited_and_conversations_are_refused(recipe_file, jsonl):
    recipe = load_recipe(recipe_file(), ["evaluation.limit=3"])
    assert len(scoring_rows(recipe, "pocket/facts")) == 3
    assert set(scoring_rows(recipe, "pocket/corpus")[0]) == {"text"}
    with pytest.raises(RecipeError, match="conversations, which this version does not score"):
        scoring_rows(recipe, str(jsonl(CHAT)))
