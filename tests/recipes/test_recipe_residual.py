"""Recipes whose adapter lies beside a quantised residual: what is refused, what is written, what loads again."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmreg.errors import RecipeError
from llmreg.methods import get_method
from llmreg.recipes import evaluate, load_recipe, plan, prepare_starts, preview, run

RECIPE = "recipes/pocket-qpissa.yaml"
FEW = ("training.max_steps=2", "training.per_device_train_batch_size=2", "evaluation.limit=4", "adapter.r=4")
LAYERS = "adapter.target_modules=[q_proj, down_proj]"


def recipe(*overrides):
    return load_recipe(RECIPE, [*FEW, LAYERS, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=null"], r"adapter\.residual|quantized quantises what the adapter does not carry"),
        (
            ["task=dpo", "data.train=pocket/preferences", "evaluation={}"],
            r"a disabled adapter is no reference for dpo; write residual: difference",
        ),
        (["output.serve=vllm"], r"is saved here as adapter and quantised residual; write output\.rank"),
    ],
)
def test_what_a_quantised_residual_rules_out_is_refused_before_anything_loads(overrides, message):
    with pytest.raises(RecipeError, match=message):
        plan(recipe(*overrides))


def test_there_is_nothing_to_prepare():
    with pytest.raises(RecipeError, match="made together with its adapter when training begins"):
        prepare_starts(recipe())


def test_the_dry_run_and_the_catalogue_say_what_is_saved(tmp_path):
    shown = preview(recipe(f"output.dir={tmp_path}/run"))
    assert (shown.form, shown.exported_rank) == ("adapter and quantised residual", 4)
    config = plan(recipe()).adapter
    for name in ("pissa", "sorsa", "corda"):
        assert get_method(name).form_of(config) == "adapter and quantised residual"
        assert get_method(name).rank_of(config) == 1
    assert get_method("pissa").rank_of(plan(recipe("adapter.residual=difference")).adapter) == 2


def test_a_run_writes_adapter_residual_and_an_approximate_lora(tmp_path):
    folder = tmp_path / "run"
    report = run(recipe(f"output.dir={folder}", "output.rank=8"))
    assert report.residual["layers"] == 8
    assert 0 < report.residual["error"] < report.residual["quantized_error"] < 0.2
    assert json.loads((folder / "report.json").read_text())["residual"] == report.residual
    assert report.export["rank"] == 8
    base = AutoModelForCausalLM.from_pretrained(folder / "adapter" / "residual")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    assert bool(model(ids).logits.isfinite().all())
    measured = evaluate(folder, ["evaluation.limit=4"])
    assert all(row["merged"] is None and row["adapter"] is not None for row in measured.scores)
