"""Keys, types and overrides: whatever is wrong is named with its place and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from valid_recipe import VALID

from llmreg.errors import RecipeError
from llmreg.recipes import dump_recipe, load_recipe, make_recipe, plan

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_a_valid_recipe_is_planned(recipe_file):
    settled = plan(load_recipe(recipe_file()))
    assert settled.adapter.r == 16
    assert settled.training.max_steps == 2
    assert settled.exported_rank == 32


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_of_the_repository_validates(path, tmp_path):
    settled = plan(load_recipe(path, [f"output.dir={tmp_path / 'out'}"]))
    opening = path.read_text().splitlines()[:6]
    assert f"#   llmreg train recipes/{path.name}" in opening, "a recipe opens with how to run it"
    assert settled.recipe.evaluation.tasks or settled.recipe.evaluation.heldout or settled.recipe.data.test


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("task: sft", "taks: sft", "recipe.yaml:2:1: unknown key 'taks'; did you mean 'task'?"),
        ("  train:", "  trian:", "recipe.yaml:4:3: unknown key 'data.trian'; did you mean 'train'?"),
        ("  r: 16", "  rnak_pattern: {}", "recipe.yaml:7:3: unknown key 'adapter.rnak_pattern'"),
        ("  learning_rate:", "  lerning_rate:", "recipe.yaml:10:3: unknown key 'training.lerning_rate'"),
        ("  tasks:", "  task:", "recipe.yaml:13:3: unknown key 'evaluation.task'; did you mean 'tasks'?"),
        ("  dir:", "  directory:", "recipe.yaml:15:3: unknown key 'output.directory'; did you mean 'dir'?"),
        ("max_steps: 2", "max_step: 2", "did you mean 'max_steps'?"),
        ("max_steps: 2", "optim: adamw_toch", "recipe.yaml:11:10: training.optim should be"),
    ],
)
def test_an_unknown_key_is_named_with_line_column_and_suggestion(complaint, old, new, said):
    assert old in VALID
    assert said in complaint(text=VALID.replace(old, new))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rate=fast", "training.learning_rate should be a number, not 'fast'"),
        ("training.learning_rate='2e-3'", "training.learning_rate should be a number, not '2e-3'"),
        ("training.max_steps=true", "training.max_steps should be an integer, not True"),
        ("training.max_steps=2.5", "training.max_steps should be an integer, not 2.5"),
        ("training.bf16=yes", "training.bf16 should be true or false, not 'yes'"),
        ("training.lr_scheduler_type=cosin", "did you mean 'cosine'?"),
        ("training.save_strategy=stepz", "one of no, steps, epoch, best, not 'stepz'; did you mean 'steps'?"),
        ("training.parallelism_config={}", "which a recipe cannot write; leave it out"),
        ("adapter.r='16'", "adapter.r should be an integer, not '16'"),
        ("adapter.r=[16]", "adapter.r should be an integer, not [16]"),
        ("adapter.svd=exac", "adapter.svd should be one of randomized, exact, not 'exac'; did you mean 'exact'?"),
        ("adapter.target_modules=3", "adapter.target_modules should be text or a list, not 3"),
        ("adapter.eva_config={}", "which a recipe cannot write; leave it out"),
        ("adapter.method=3", "adapter.method should be a valid string, not 3"),
        ("model.quantization=nf3", "should be 'nf4' or 'int8', not 'nf3'; did you mean 'nf4'?"),
        ("model.name=", "model.name should be a valid string, not None"),
        ("model=pocket", "model should be a mapping of keys to values, not 'pocket'"),
        ("evaluation.limit=0", "evaluation.limit should be greater than or equal to 1, not 0"),
        ("evaluation.tasks=[1]", "evaluation.tasks.0 should be a valid string, not 1"),
        ("output.rank=0", "output.rank should be greater than or equal to 1, not 0"),
        ("seed=-1", "seed should be greater than or equal to 0"),
        ("seed=x", "seed should be a valid integer, not 'x'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_before_anything_loads(complaint, override, said):
    message = complaint(override)
    assert message.startswith("argument ")
    assert said in message
    assert message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task=edit", "the task edit is not in this version of llmreg; write sft, dpo, grpo or classification"),
        ("task=sff", "there is no task 'sff'; did you mean 'sft'?"),
        ("calibration={data: pocket/corpus}", "pissa takes no calibration data; remove the section"),
        ("training.output_dir=x", "write it under output.dir"),
        ("training.seed=3", "write it as seed at the top of the recipe"),
        ("training.gradient_checkpointing=true", "write training.activation_checkpointing"),
        ("training.push_to_hub=true", "publish the result with llmreg push"),
        ("adapter.task_type=CAUSAL_LM", "the recipe's task decides it"),
    ],
)
def test_what_a_recipe_does_not_set_says_what_to_write_instead(complaint, override, said):
    assert said in complaint(override)


def test_an_unknown_method_is_named_with_the_nearest(complaint):
    message = complaint("adapter.method=pisa")
    assert "there is no method 'pisa'; did you mean 'pissa'? Known methods: pissa, sorsa" in message


def test_overrides_replace_add_and_create(recipe_file):
    recipe = load_recipe(
        recipe_file(),
        [
            "training.learning_rate=5e-4",
            "training.weight_decay=0",
            "adapter.exclude_modules=[down_proj]",
            "model.name=x/y",
        ],
    )
    assert recipe.training == {"learning_rate": 5e-4, "max_steps": 2, "weight_decay": 0}
    assert recipe.adapter.settings["exclude_modules"] == ["down_proj"]
    assert recipe.model.name == "x/y"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.max_steps", "an override is written key=value"),
        ("=3", "an override is written key=value"),
        ("training..x=3", "an override is written key=value"),
        ("model.name.x=3", "model.name is a single value, so it has no 'x'"),
        ("training.max_steps=[1", "not valid YAML"),
        ("training.max_steps=&a 1", "anchors and aliases"),
        ("training.x.y=1", "unknown key 'training.x'"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(complaint, override, said):
    message = complaint(override)
    assert message.startswith(f"argument {override!r}")
    assert said in message


def test_a_missing_section_is_named(complaint):
    assert "'adapter' is missing" in complaint("adapter=")
    assert "'output.dir' is missing" in complaint("output={}")


def test_the_resolved_recipe_loads_again_as_the_same(recipe_file):
    recipe = load_recipe(recipe_file())
    again = load_recipe(recipe_file(dump_recipe(recipe)))
    assert again.resolved() == recipe.resolved()


def test_a_mapping_is_a_recipe_too(tmp_path):
    values = {
        "model": {"name": "pocket"},
        "data": {"train": "pocket/word-problems"},
        "adapter": {"method": "lora", "r": 4},
        "output": {"dir": str(tmp_path / "out")},
    }
    assert plan(make_recipe(values, ["adapter.r=8"])).exported_rank == 8
    with pytest.raises(RecipeError, match=r"recipe: unknown key 'modle'; did you mean 'model'\?"):
        make_recipe({**values, "modle": 1})
    with pytest.raises(RecipeError, match="plain values only"):
        make_recipe({**values, "seed": object()})
