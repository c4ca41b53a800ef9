"""A recipe's `regularizers`: what is refused before a model loads, and that they act in every task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

import llmreg.pocket
from llmreg import RegularizerCallback
from llmreg.errors import RecipeError
from llmreg.recipes import load_recipe, plan, run

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ["training.max_steps=2", "training.logging_steps=1", "adapter.r=4", "evaluation={}"]


def recipe(name, folder, *overrides):
    return load_recipe(RECIPES / f"{name}.yaml", [*SHORT, f"output.dir={folder}/run", *overrides])


def logged(name, folder, *overrides):
    """What a run's regularisers logged at its last step, from its report."""
    run(recipe(name, folder, *overrides))
    report = json.loads((Path(folder) / "run" / "report.json").read_text())
    return {name: points[-1][1] for name, points in report["regularizers"].items()}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "quickstart",
            ["regularizers=[{name: consistncy}]"],
            "no regulariser 'consistncy'; did you mean 'consistency'",
        ),
        ("quickstart", ["regularizers=[{name: consistency, wieght: 1}]"], "did you mean 'weight'"),
        ("quickstart", ["regularizers=[{name: diversity, weight: -1}]"], "weight must be a number >= 0"),
        ("quickstart", ["regularizers=[{name: diversity, weight: .nan}]"], "finite number"),
        ("quickstart", ["regularizers=[{name: diversity, schedule: cosin}]"], "did you mean 'cosine'"),
        ("quickstart", ["regularizers=[diversity, diversity]"], "listed twice"),
        ("quickstart", ["regularizers=3"], "should be a list"),
        ("quickstart", ["regularizers=[low_probability]"], "needs advantages, which only task: grpo has"),
        ("quickstart", ["regularizers=[orthonormal]"], "adapter.method: sorsa"),
        ("quickstart", ["regularizers=[{name: consistency, teacher: x}]"], "the base is it else"),
        ("quickstart", ["regularizers=[{name: consistency, task: nlu}]"], "write task: classification"),
        ("pocket-classification", ["regularizers=[targeted_entropy]"], "which a classifier has not"),
        ("pocket-classification", ["regularizers=[consistency]"], "write teacher: PATH"),
        ("pocket-classification", ["adapter.method=balora"], "teacher with a trained head"),
        ("pocket-qpissa", ["regularizers=[consistency]"], "residual: quantized changes that base"),
        ("pocket-balora", ["regularizers=[targeted_entropy]"], "asks for consistency, diversity, singular_values too"),
        ("pocket-sorsa", ["regularizers=[diversity]"], "asks for orthonormal too"),
        ("pocket-balora", ["adapter.variant=v1", "training.packing=true"], "consistency is a statistic of rows"),
        ("quickstart", ["regularizers=[diversity]", "training.fp16=true"], "fp16 scales the loss"),
        ("pocket-balora", ["training.fp16=true"], "fp16 scales the loss"),
    ],
)
def test_what_could_not_act_is_refused_with_what_to_write(tmp_path, name, overrides, message):
    with pytest.raises(RecipeError, match=message):
        plan(recipe(name, tmp_path, *overrides))


def test_a_complaint_says_where_it_was_written(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text((RECIPES / "quickstart.yaml").read_text() + "regularizers:\n  - {name: diversity, weight: -1}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2\d:\d+: diversity: weight must be"):
        plan(load_recipe(path, [f"output.dir={tmp_path}/run"]))


@pytest.mark.parametrize("name", ["pocket-sorsa", "pocket-balora"])
def test_one_callback_applies_what_the_config_asks_for(tmp_path, monkeypatch, name):
    begun, begin = [], RegularizerCallback.on_train_begin

    def counted(self, *args, **kwargs):
        begun.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(RegularizerCallback, "on_train_begin", counted)
    run(recipe(name, tmp_path, "training.max_steps=1"))
    assert len(begun) == 1


def test_terms_act_in_sft_and_the_config_s_own_too(tmp_path):
    listed = logged("quickstart", tmp_path / "a", "regularizers=[{name: consistency, weight: 0.1}, singular_values]")
    assert {"consistency", "singular_values_weight"} <= set(listed)
    own = logged("pocket-balora", tmp_path / "b")
    assert own["consistency_weight"] > 0
    assert "consistency" in own


def test_lp_reg_acts_in_grpo(tmp_path):
    small = ["training.per_device_train_batch_size=8", "training.num_generations=4", "data.split=validation"]
    rows = logged("pocket-grpo", tmp_path, *small, "regularizers=[{name: low_probability, percentile: 0.3}]")
    assert {"low_probability", "spark_share"} <= set(rows)


def test_a_classifier_s_consistency_takes_a_teacher(tmp_path):
    model = llmreg.pocket.load_model()
    config = LlamaConfig(**{**model.config.to_dict(), "num_labels": 3})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    rows = logged(
        "pocket-classification",
        tmp_path,
        f"regularizers=[{{name: consistency, teacher: {tmp_path}/teacher}}, {{name: singular_values, k: 1}}]",
    )
    assert rows["consistency"] > 0
    with pytest.raises(RecipeError, match="cannot be loaded"):
        run(recipe("pocket-classification", tmp_path / "b", "regularizers=[{name: consistency, teacher: nowhere}]"))


def test_schedules_go_on_where_a_resumed_run_left_them(tmp_path):
    """To the same bits, and with the same terms logged, as a run in one piece."""
    settings = [
        "training.max_steps=4",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "data.split=validation",
    ]
    settings += ["regularizers=[{name: consistency, weight: 0.5}, {name: diversity, schedule: linear_warmup}]"]
    whole = run(recipe("quickstart", tmp_path / "whole", *settings))
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / "run" / "checkpoints", folder / "run" / "checkpoints")
    shutil.rmtree(folder / "run" / "checkpoints" / "checkpoint-4")
    again = run(recipe("quickstart", folder, *settings), resume=True)
    weights = "run/adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert again.regularizers == whole.regularizers
