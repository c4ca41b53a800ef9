"""What stands behind `eval`, `init`, `schema` and `--dry-run`: one function each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import pytest

from llmreg import SvfitConfig, pocket
from llmreg.errors import AdapterFileError, RecipeError
from llmreg.recipes import evaluate, load_recipe, prepare_starts, preview, recipe_schema, run
from llmreg.recipes.starting import clear_starts, list_starts

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SHORT = ["data.split=validation", "training.max_steps=2", "adapter.r=4", "evaluation.limit=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run: its report and folder."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return run(load_recipe(QUICKSTART, [*SHORT, f"output.dir={folder}"])), folder


# -- eval -------------------------------------------------------------------------------------------------------


def test_eval_of_a_run_repeats_its_scores_and_adds_the_merged_model(finished):
    report, folder = finished
    result = evaluate(folder)
    assert [(row["base"], row["adapter"]) for row in result.scores] == [
        (row.before, row.after) for row in report.measurements
    ]
    assert [row["forgetting"] for row in result.scores] == [row.forgotten for row in report.measurements]
    for row in result.scores:
        assert row["merged"] == pytest.approx(row["adapter"], rel=1e-3, abs=0.13)  # one answer of eight may flip
    json.dumps(result.as_dict())


def test_eval_takes_the_adapter_folder_a_recipe_and_an_adapter_without_a_recipe(finished, tmp_path):
    import shutil

    _, folder = finished
    overrides = ["evaluation={tasks: [pocket/facts], limit: 4}"]
    by_adapter = evaluate(folder / "adapter", overrides, merged=False)
    assert by_adapter.scores[0]["merged"] is None
    by_recipe = evaluate(folder / "recipe.yaml", overrides, merged=False)
    assert by_recipe.scores == by_adapter.scores
    alone = tmp_path / "alone"
    shutil.copytree(folder / "adapter", alone)
    with pytest.raises(RecipeError, match="there is nothing to measure"):
        evaluate(alone, ["model.name=pocket"])
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(RecipeError, match="does not name its base"):
        evaluate(alone, overrides)
    assert evaluate(alone, ["model.name=pocket", *overrides], merged=False).scores == by_adapter.scores


def test_eval_of_a_recipe_that_has_not_run_measures_the_base(tmp_path):
    result = evaluate(QUICKSTART, [*SHORT, f"output.dir={tmp_path / 'none'}", "evaluation.forgetting=[]"])
    assert result.adapter is None
    assert [(row["adapter"], row["forgetting"]) for row in result.scores] == [(None, None)]


def test_eval_of_nothing_is_one_message(tmp_path):
    with pytest.raises(RecipeError, match="is neither a recipe, a folder nor a Hub id"):
        evaluate(tmp_path / "gone" / "there")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="give a folder with a saved adapter"):
        evaluate(tmp_path / "empty")


# -- init -------------------------------------------------------------------------------------------------------


def test_init_fills_a_cache_from_which_training_takes_the_same_start(finished, tmp_path, monkeypatch):
    report, _ = finished
    monkeypatch.setenv("LLMREG_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(QUICKSTART, [*SHORT, f"output.dir={tmp_path / 'out'}", "evaluation={}"])
    first = prepare_starts(recipe)
    assert (first.layers, first.found, first.computed, first.entries) == (28, 0, 28, 28)
    again = prepare_starts(recipe)
    assert (again.found, again.computed) == (28, 0)
    assert len(list_starts()) == 28

    def never(*arguments, **options):
        raise AssertionError("decomposed although the start is there")

    monkeypatch.setattr(sys.modules["llmreg.initializers.components"], "truncated_svd", never)
    assert run(recipe).start_hash == report.start_hash
    assert clear_starts()[0] == 28
    assert list_starts() == []


def test_init_of_a_method_without_a_decomposition_is_one_message():
    with pytest.raises(RecipeError, match="lora starts from random numbers"):
        prepare_starts(load_recipe(ROOT / "recipes" / "pocket-lora.yaml"))


# -- schema -----------------------------------------------------------------------------------------------------


def test_the_schema_that_recipes_point_to_is_the_one_printed():
    """`llmreg schema > recipes/schema.json` after a change; it describes the versions that were installed then."""
    stored = json.loads((ROOT / "recipes" / "schema.json").read_text())
    current = json.loads(json.dumps(recipe_schema()))
    if stored["$comment"] != current["$comment"]:
        pytest.skip(f"schema.json is of {stored['$comment']}, and installed is {current['$comment']}")
    assert stored == current


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_opens_with_how_to_run_it_and_fits_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    text = path.read_text()
    assert "# yaml-language-server: $schema=schema.json" in text
    assert f"llmreg train recipes/{path.name}" in text
    from llmreg.recipes.document import parse

    jsonschema.validate(parse(text, path.name).values, recipe_schema())


def test_the_schema_refuses_what_validate_refuses():
    jsonschema = pytest.importorskip("jsonschema")
    from llmreg.recipes.document import parse

    values = parse(QUICKSTART.read_text(), "recipe").values
    for section, key in (("training", "lerning_rate"), ("adapter", "rnk"), ("output", "folder")):
        wrong = {**values, section: {**values[section], key: 1}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, recipe_schema())


@pytest.mark.parametrize(
    "text",
    [
        "include: quickstart.yaml\nadapter: {r: 8}\n",
        "include: quickstart.yaml\noutput: {rank: 8}\n",
        "include: pocket-dpo.yaml\ntraining: {beta: 0.2}\n",
    ],
)
def test_a_recipe_that_includes_another_may_leave_anything_to_it(text, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    from llmreg.recipes import plan
    from llmreg.recipes.document import parse

    jsonschema.validate(parse(text, "recipe").values, recipe_schema())
    file = tmp_path / "top.yaml"
    file.write_text(text.replace("include: ", f"include: {ROOT / 'recipes'}/"))
    plan(load_recipe(file, [f"output.dir={tmp_path / 'out'}"]))


# -- dry run ----------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_happen_and_writes_nothing(finished, tmp_path, monkeypatch):
    report, _ = finished
    monkeypatch.chdir(tmp_path)
    result = preview(load_recipe(QUICKSTART, [*SHORT, "output.dir=out"]))
    assert list(tmp_path.iterdir()) == []
    assert result.layers == 28
    assert result.parameters.trainable == report.trainable_parameters
    assert result.parameters.frozen_extra == report.trainable_parameters
    assert sum(result.parameters) == report.total_parameters
    assert (result.exported_rank, result.vllm_rank) == (8, 8)
    assert result.as_dict()["peak"] == result.memory.peak > 0
    assert 0 < result.start_seconds < 60
    json.dumps(result.as_dict())


def test_a_dry_run_lists_targets_pattern_by_pattern_and_refuses_none_at_all():
    result = preview(load_recipe(QUICKSTART, ["adapter.target_modules=[q_proj, nothing, down_proj]"]))
    assert {pattern: len(names) for pattern, names in result.targets.items()} == {
        "q_proj": 4,
        "nothing": 0,
        "down_proj": 4,
    }
    assert "nothing matches no layer." in result.notes
    with pytest.raises(RecipeError, match="matches no layer of the model; its linear layers are"):
        preview(load_recipe(QUICKSTART, ["adapter.target_modules=[nothing]"]))


def test_a_dry_run_downloads_nothing():
    with pytest.raises(RecipeError, match="a dry run downloads nothing; fetch it with `hf download owner/name"):
        preview(load_recipe(QUICKSTART, ["model.name=owner/name"]))


def test_a_dry_run_says_which_ranks_energy_would_choose(tmp_path):
    text = VALID_ENERGY.format(folder=tmp_path / "run", settings="energy: 0.9")
    (tmp_path / "recipe.yaml").write_text(text)
    found = preview(load_recipe(tmp_path / "recipe.yaml"))
    assert any("energy=0.9 chooses ranks" in note for note in found.notes)
    assert any("allow_large" in note for note in found.notes), "on the pocket model they pass a quarter"
    assert found.exported_rank > 16
    model = peft.get_peft_model(
        pocket.load_model(), SvfitConfig(energy=0.9, allow_large=True, target_modules="all-linear")
    )
    live = model.peft_config["default"]
    assert found.exported_rank == max(live.rank_pattern.values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.parameters.trainable == trained


VALID_ENERGY = """
model: {{name: pocket}}
task: sft
data: {{train: pocket/word-problems}}
adapter: {{method: svfit, {settings}, target_modules: all-linear}}
training: {{max_steps: 1, max_length: 64}}
output: {{dir: {folder}}}
"""


def test_a_dry_run_of_a_method_with_a_regulariser_knows_its_memory(tmp_path):
    result = preview(load_recipe(ROOT / "recipes" / "pocket-sorsa.yaml", [f"output.dir={tmp_path}/out"]))
    assert result.memory.activations
    assert not any("regulariser" in note for note in result.notes)


def test_a_dry_run_of_chosen_ranks_says_what_vllm_needs(tmp_path):
    adapter = "adapter={method: svfit, energy: 0.5, allow_large: true, target_modules: all-linear}"
    result = preview(load_recipe(QUICKSTART, [adapter, f"output.dir={tmp_path}/out"]))
    assert result.vllm_rank >= result.exported_rank > 1
    with pytest.raises(RecipeError, match="energy chooses a rank for each layer"):
        preview(load_recipe(QUICKSTART, [adapter, "output.serve=vllm", f"output.dir={tmp_path}/out"]))
