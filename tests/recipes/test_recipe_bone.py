"""Bone through recipes: every task and base trains, resumes to the same bits, and what it cannot do fails first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmreg.errors import RecipeError
from llmreg.recipes import load_recipe, plan, run
from llmreg.recipes.dry_run import preview
from llmreg.recipes.evaluating import evaluate
from llmreg.recipes.starting import prepare_starts

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ["data.split=validation", "training.max_steps=2", "evaluation.limit=4", "training.warmup_steps=0"]
VARIANTS = {
    "bone": "adapter={method: bone, r: 16, target_modules: all-linear}",
    "mini": "adapter={method: bone, variant: mini, r: 16, mini_r: 8, target_modules: all-linear}",
    "bat": "adapter={method: bone, variant: bat, r: 16, target_modules: all-linear}",
}


def recipe(folder, variant, *overrides, name="pocket-bone"):
    return load_recipe(RECIPES / f"{name}.yaml", [VARIANTS[variant], *SHORT, f"output.dir={folder}", *overrides])


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_run_reports_what_was_saved_and_eval_finds_it_again(variant, tmp_path):
    report = run(recipe(tmp_path / "out", variant))
    assert (report.method, report.rank, report.form, report.start_hash) == ("bone", 16, "PEFT MiSS", None)
    assert bool(report.singular_values) == (variant != "bat"), "an update of full rank has no short list"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "PEFT MiSS of rank 16" in page
    assert "plain LoRA" not in page
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "plain LoRA of rank" not in card
    again = evaluate(tmp_path / "out")
    for row, before in zip(again.scores, report.measurements, strict=True):
        assert row["adapter"] == pytest.approx(before.after)
        assert row["merged"] == pytest.approx(before.after, rel=1e-3)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("bone", "pocket-classification-lora"),
        ("bat", "pocket-nf4"),
        *[  # the test below trains the third task
            pytest.param(variant, name, marks=pytest.mark.slow)
            for variant, name in (
                ("bat", "pocket-classification-lora"),
                ("bone", "pocket-nf4"),
                ("bone", "pocket-dpo-lora"),
                ("bat", "pocket-dpo-lora"),
            )
        ],
    ],
)
def test_every_task_and_an_nf4_base_train_it(variant, name, tmp_path):
    report = run(recipe(tmp_path / "out", variant, name=name))
    assert report.steps == 2
    assert report.train_loss == report.train_loss
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MISS"


def test_dpo_starts_at_ln_2(tmp_path):
    report = run(recipe(tmp_path / "out", "bat", "training.logging_steps=1", "evaluation={}", name="pocket-dpo-lora"))
    assert report.losses[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("variant", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("bone", "mini")), "bat"])
def test_a_resumed_run_ends_with_the_same_bits(variant, tmp_path):
    saving = ["training.save_strategy=steps", "training.save_steps=2", "training.max_steps=4", "evaluation={}"]
    dropout = "adapter.bone_dropout=0.1"
    report = run(recipe(tmp_path / "whole", variant, *saving, dropout))
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "out" / "checkpoints")
    (tmp_path / "out" / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    again = run(recipe(tmp_path / "out", variant, *saving, dropout), resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert again.losses == report.losses


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("base", [[], ["model.quantization=nf4"]], ids=["float", "nf4"])
def test_a_dry_run_knows_parameters_memory_and_form(variant, base, tmp_path):
    seen = preview(recipe(tmp_path / "out", variant, *base))
    assert seen.form == "PEFT MiSS"
    assert seen.vllm_rank is None
    assert seen.layers == 28
    assert seen.parameters.trainable == (28 * 16 * 8 if variant == "mini" else 90_112)
    assert seen.memory.activations is not None
    assert seen.start_seconds == 0
    assert "PEFT MiSS of rank 16" in "\n".join(map(str, seen.renderables()))


def test_a_rank_or_dtype_of_the_output_exports_a_lora(tmp_path):
    report = run(recipe(tmp_path / "out", "bone", "output.rank=16", "evaluation={}"))
    assert report.export["rank"] == 16
    assert report.export["relative_error"] < 1e-6
    assert json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert preview(recipe(tmp_path / "new", "bone", "output.rank=16")).vllm_rank == 16


@pytest.mark.parametrize(
    ("variant", "overrides", "said"),
    [
        ("bat", ["output.rank=8"], "output.rank asks for a LoRA, and a 'bat' adapter's update has full rank"),
        ("bat", ["output.dtype=bfloat16"], "output.dtype asks for a LoRA"),
        ("bat", ["output.serve=vllm"], "output.serve asks for a LoRA"),
        ("bone", ["output.serve=vllm"], "vLLM serves LoRA, and bone is saved here as PEFT MiSS; write output.rank"),
        ("bone", ["adapter.mini_r=4"], "mini_r=4 belongs to variant='mini'"),
        ("bone", ["adapter.variant=bats"], "adapter.variant should be one of bone, bat, mini, not 'bats'"),
        ("bone", ["adapter.lora_alpha=4"], "unknown key 'adapter.lora_alpha' (not a field of BoneConfig)"),
        ("bone", ["adapter.init_weights=bat"], "unknown key 'adapter.init_weights'"),
        ("bone", ["adapter.r=0"], "r must be a positive integer"),
        ("bone", ["adapter.target_modules=[lm_head]"], "lm_head cannot be a target"),
    ],
)
def test_conflicts_fail_before_the_model_loads(variant, overrides, said, tmp_path):
    with pytest.raises(RecipeError) as caught:
        plan(recipe(tmp_path / "out", variant, *overrides))
    assert said in str(caught.value)


def test_a_rank_that_does_not_divide_the_layers_is_one_message(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot be cut into 24 x 24 blocks.*write one of r=1, 2, 4"):
        preview(recipe(tmp_path / "out", "bat", "adapter.r=24"))


def test_there_is_nothing_to_decompose(tmp_path):
    with pytest.raises(RecipeError, match="bone starts from zero, so there is nothing to decompose"):
        prepare_starts(recipe(tmp_path / "out", "bone"), tmp_path / "starts")
