"""Recipes laid over others, and the environment in their paths."""

from __future__ import annotations

import pytest
from valid_recipe import VALID

from llmreg.errors import RecipeError
from llmreg.recipes import load_recipe, make_recipe


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.yaml").write_text(VALID.replace("OUTPUT", "runs/base"))
    return tmp_path


def write(folder, text, name="top.yaml"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_a_recipe_is_laid_over_the_one_it_includes_key_by_key(folder):
    top = write(folder, "include: base.yaml\ntraining: {max_steps: 7}\nevaluation:\n  tasks: [pocket/facts]\n")
    recipe = load_recipe(top, ["training.weight_decay=0.5"])
    assert recipe.training == {"learning_rate": 1e-3, "max_steps": 7, "weight_decay": 0.5}
    assert recipe.evaluation.tasks == ("pocket/facts",)
    assert recipe.output.dir == "runs/base"


def test_includes_are_relative_to_their_file_and_may_be_chained(folder):
    write(folder, "include: ../base.yaml\nseed: 3\n", "inner/middle.yaml")
    recipe = load_recipe(write(folder, "include: inner/middle.yaml\ntask: sft\n"))
    assert (recipe.seed, recipe.model.name) == (3, "pocket")


def test_a_mistake_is_reported_in_the_file_that_holds_it(folder):
    (folder / "base.yaml").write_text(VALID.replace("OUTPUT", "runs/x").replace("learning_rate", "lerning_rate"))
    from llmreg.recipes import plan

    with pytest.raises(RecipeError, match=r"base\.yaml:10:3: unknown key 'training.lerning_rate'.*learning_rate"):
        plan(load_recipe(write(folder, "include: base.yaml\n")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("include: gone.yaml\n", "top.yaml:1:10: .*gone.yaml does not exist"),
        ("include: 3\n", "include should be the path of one recipe"),
        ("include: [base.yaml]\n", "include should be the path of one recipe"),
        ("include: top.yaml\n", "includes itself"),
        ("include: ${LLMREG_NOT_SET}/a.yaml\n", "LLMREG_NOT_SET is not set"),
    ],
)
def test_a_wrong_include_is_one_message(folder, text, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(write(folder, text))


def test_two_files_that_include_each_other_are_refused(folder):
    write(folder, "include: top.yaml\n", "other.yaml")
    with pytest.raises(RecipeError, match="includes itself"):
        load_recipe(write(folder, "include: other.yaml\n"))


def test_the_environment_stands_in_paths_with_or_without_a_default(folder, monkeypatch):
    monkeypatch.setenv("LLMREG_TEST_DIR", "/somewhere")
    recipe = load_recipe(
        folder / "base.yaml", ["output.dir=${LLMREG_TEST_DIR}/run", "model.name=${LLMREG_GONE:-pocket}"]
    )
    assert (recipe.output.dir, recipe.model.name) == ("/somewhere/run", "pocket")


def test_a_variable_that_is_not_set_is_named_with_its_place(folder):
    top = write(folder, "include: base.yaml\noutput:\n  dir: ${LLMREG_GONE}/x\n")
    with pytest.raises(RecipeError, match=r"top\.yaml:3:8: the environment variable LLMREG_GONE is not set"):
        load_recipe(top)


def test_text_that_is_no_path_keeps_its_dollars(folder):
    recipe = load_recipe(folder / "base.yaml", ["data.columns={prompt: '${x} {q}', completion: a}"])
    assert recipe.data.columns["prompt"] == "${x} {q}"


def test_a_mapping_in_python_may_include_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert make_recipe({"include": "base.yaml", "seed": 5}).seed == 5
