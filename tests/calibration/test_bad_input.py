"""What calibration refuses, and what it says."""

from __future__ import annotations

import language_models as lm
import pytest
import tiny_models
import torch
from language_models import LINEARS, NEEDS
from torch import nn

from llmreg.calibration import Need, calibrate
from llmreg.errors import RecipeError, WeightError

IDS = torch.ones(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batches", "need", "message"),
    [
        ([], None, "empty"),
        (iter(()), None, "empty"),
        ([{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)}], None, "attention masks"),
        (
            [{"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), -100)}],
            Need(use_label_mask=True),
            "-100",
        ),
    ],
    ids=["no batches", "used up", "masked", "unlabelled"],
)
@pytest.mark.parametrize("budget", [None, 10**9])
def test_data_without_a_token_is_refused(batches, need, message: str, budget: int | None) -> None:
    with pytest.raises(RecipeError, match=message):
        calibrate(tiny_models.llama(), batches, LINEARS, need, memory_budget=budget)


def test_a_masked_batch_among_others_is_fine() -> None:
    model, batch = tiny_models.llama(), lm.padded(lm.documents((5,)), "right")
    empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    statistics = calibrate(model, [empty, batch], LINEARS, NEEDS[1])
    assert (statistics.report.tokens, statistics[LINEARS[0]].samples) == (5, 1)


def test_an_unreached_layer_is_an_error_unless_reported() -> None:
    model = tiny_models.llama()
    model.spare = nn.Linear(4, 4)
    batches = lm.single(lm.documents())
    with pytest.raises(RecipeError, match=r"1 of 2 layers.*'spare'.*unreached='report'"):
        calibrate(model, batches, ["spare", LINEARS[0]])
    statistics = calibrate(model, batches, ["spare", LINEARS[0]], unreached="report")
    assert statistics.report.unreached == ("spare",)
    assert "spare" not in statistics


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("need", [None, *NEEDS])
@pytest.mark.parametrize("sketch", [None, 8])
def test_a_nonfinite_input_is_named_with_its_layer(value: float, need: Need | None, sketch: int | None) -> None:
    model = tiny_models.mlp()
    with torch.no_grad():
        model.first.bias[3] = value
    model.forward = lambda x: model.second(model.first(x))
    with pytest.raises(WeightError, match=r"'second'.*NaN or infinite"):
        calibrate(model, [tiny_models.inputs()], ["first", "second"], need, sketch=sketch)


def test_nonfinite_values_in_padding_do_not_matter() -> None:
    x = torch.randn(1, 4, 20)
    x[0, 3] = float("nan")
    batch = {"inputs_embeds": x, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    model = tiny_models.mlp()
    statistics = calibrate(model, [batch], ["first"], NEEDS[2], forward=lambda m, b: m(b["inputs_embeds"]))
    assert statistics["first"].count == 3
    assert bool(statistics["first"].second_moment().isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["model.layers.0.mlp.gate_prj"]}, "did you mean 'model.layers.0.mlp.gate_proj'"),
        ({"layers": []}, "at least one layer"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"sketch": -1}, "sketch is -1"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"exact": True, "sketch": 8}, "contradict"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    arguments = {"layers": LINEARS, **arguments}
    with pytest.raises(RecipeError, match=message):
        calibrate(tiny_models.llama(), lm.single(lm.documents()), **arguments)
