"""Calibration of whole models: which tokens count, and what comes back as it was."""

from __future__ import annotations

import random

import language_models as lm
import numpy as np
import pytest
import tiny_models
import torch
from language_models import LINEARS, NEEDS, assert_close, relative
from torch import nn

from llmreg.calibration import Need, calibrate

# -- which tokens count ---------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs_that_the_layers_get() -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    statistics = calibrate(model, batches, LINEARS)
    for name in LINEARS:
        assert relative(statistics[name].second_moment(), lm.dense_moment(lm.inputs_of(model, name, batches))) < 1e-6
    assert statistics[LINEARS[0]].count == statistics.report.tokens == 9 + 5 + 12 + 7
    assert statistics[LINEARS[0]].samples == statistics.report.batches == 4


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_four_is_four_single_runs(side: str, need: Need) -> None:
    model, texts = tiny_models.llama(), lm.documents()
    assert_close(
        calibrate(model, [lm.padded(texts, side)], LINEARS, need), calibrate(model, lm.single(texts), LINEARS, need)
    )


@pytest.mark.parametrize("need", NEEDS)
def test_packed_documents_are_single_runs(need: Need) -> None:
    model, texts = tiny_models.llama(), lm.documents()
    assert_close(calibrate(model, [lm.packed(texts)], LINEARS, need), calibrate(model, lm.single(texts), LINEARS, need))


def test_what_stands_in_the_padding_changes_nothing() -> None:
    model, batch = tiny_models.llama(), lm.padded(lm.documents(), "right")
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert_close(calibrate(model, [batch], LINEARS), calibrate(model, [other], LINEARS), 1e-7)


def test_only_labelled_tokens_count_where_asked_for() -> None:
    model, texts = tiny_models.llama(), lm.documents((8, 8))
    labels = torch.stack(texts)
    labels[:, :5] = -100
    batch = {"input_ids": torch.stack(texts), "labels": labels}
    name = LINEARS[-1]
    seen = lm.inputs_of(model, name, [batch])[0]
    chosen = calibrate(model, [batch], [name], Need(use_label_mask=True))[name]
    assert chosen.count == 6
    assert relative(chosen.second_moment(), lm.dense_moment([seen[:, 5:]])) < 1e-6
    assert calibrate(model, [batch], [name])[name].count == 16


def test_the_order_and_the_split_of_batches_change_nothing() -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    whole = calibrate(model, batches, LINEARS, NEEDS[2])
    halves = [calibrate(model, part, LINEARS, NEEDS[2]) for part in (batches[3:], batches[:3])]
    assert_close(calibrate(model, batches[::-1], LINEARS, NEEDS[2]), whole, 1e-6)
    merged = halves[0].merge(halves[1])
    assert_close(merged, whole, 1e-6)
    assert len(merged.groups()) == len(whole.groups())
    assert (merged.report.tokens, merged.report.batches) == (33, 4)


@pytest.mark.parametrize("cap", [1, 9, 11, 33])
def test_the_cap_counts_exactly_the_first_tokens(cap: int) -> None:
    model, texts = tiny_models.llama(), lm.documents()
    rest, name = cap, LINEARS[5]
    seen = []
    for part in lm.inputs_of(model, name, lm.single(texts)):
        seen.append(part[:, :rest])
        rest -= seen[-1].shape[1]
    capped = calibrate(model, [lm.padded(texts[:2], "left"), *lm.single(texts[2:])], [name], max_tokens=cap)
    assert capped[name].count == capped.report.tokens == cap
    assert relative(capped[name].second_moment(), lm.dense_moment(seen)) < 1e-5


def test_the_cap_stops_reading_the_data() -> None:
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"input_ids": torch.ones(1, 4, dtype=torch.long)}

    calibrate(tiny_models.llama(), endless(), LINEARS[:1], max_tokens=10)
    assert len(read) == 3


# -- the model comes back as it was ---------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict:
    return {
        "modes": [module.training for module in model.modules()],
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "bytes": tiny_models.state_bytes(model),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_hooks_and_random_states_come_back_even_after_a_failure(fails: bool) -> None:
    model = tiny_models.llama().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = traces(model)

    def forward(model, batch):
        assert not model.training
        assert not torch.is_grad_enabled()
        _ = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        model(**batch)
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, lm.single(lm.documents()), LINEARS, forward=forward)
    else:
        calibrate(model, lm.single(lm.documents()), LINEARS, forward=forward)
    assert traces(model) == before
    assert torch.is_grad_enabled()


def test_a_shuffled_loader_leaves_the_random_state_alone() -> None:
    rows = [{"input_ids": text} for text in lm.documents((6,) * 8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    statistics = calibrate(tiny_models.llama(), loader, LINEARS)
    assert torch.equal(torch.get_rng_state(), before)
    assert statistics.report.tokens == 48


def test_the_head_is_spared_unless_it_is_a_target() -> None:
    model, logits = tiny_models.llama(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: logits.append(args[0].shape[1]))
    batches = lm.single(lm.documents((9,)))
    calibrate(model, batches, LINEARS)
    assert calibrate(model, batches, ["lm_head"])["lm_head"].count == 9
    assert logits == [1, 9]


def test_labels_and_unknown_columns_are_not_passed_to_the_model() -> None:
    model = tiny_models.llama()
    batch = {**lm.single(lm.documents((9,)))[0], "completion_mask": torch.ones(1, 9)}
    batch["labels"] = batch["input_ids"] + 10_000  # would fail in a loss
    assert calibrate(model, [batch], LINEARS).report.tokens == 9


def test_the_description_lists_every_distinct_input() -> None:
    found = calibrate(tiny_models.llama(), lm.single(lm.documents()), LINEARS, sketch=8).describe()
    assert [len(group["layers"]) for group in found["groups"]] == [3, 1, 3, 1, 2, 1, 2, 1]
    assert found["groups"][0]["form"] == "sketch of 8"
    assert found["bytes"] == sum(group["bytes"] for group in found["groups"])
    assert found["tokens"] == 33
    assert found["seconds"] > 0
