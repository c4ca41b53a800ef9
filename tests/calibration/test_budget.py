"""Exact, sketched or several passes, as the given bytes allow; the report says which."""

from __future__ import annotations

import language_models as lm
import pytest
import tiny_models
import torch
from language_models import LINEARS, relative

from llmreg.calibration import InputStatistics, Need, calibrate
from llmreg.calibration.budget import AUTO_SKETCH, plan_unlimited, plan_within
from llmreg.errors import RecipeError

NEED = Need(mean=True)
BATCHES = lm.single(lm.documents())
EXACT = calibrate(tiny_models.llama(), BATCHES, LINEARS, NEED)


def test_what_fits_exactly_is_exact_and_the_report_says_so() -> None:
    found = calibrate(tiny_models.llama(), BATCHES, LINEARS, NEED, memory_budget=EXACT.bytes)
    assert found.bytes == EXACT.bytes
    assert found.report.passes == 1
    assert found.report.reason == f"exact in one pass: {EXACT.bytes} of {EXACT.bytes} bytes"


def test_a_byte_less_is_sketched_with_the_given_size() -> None:
    found = calibrate(tiny_models.llama(), BATCHES, LINEARS, NEED, memory_budget=EXACT.bytes - 1, sketch=8)
    assert not any(found[name].exact for name in LINEARS)
    assert found[LINEARS[0]].low_rank().shape == (64, 8)
    assert "sketched with 8 columns in one pass" in found.report.reason
    assert [found[name].trace for name in LINEARS] == pytest.approx([EXACT[name].trace for name in LINEARS], rel=1e-6)
    assert len(found.groups()) == len(EXACT.groups())


def test_exact_alone_takes_passes_over_layer_groups_and_gives_the_same_bits() -> None:
    budget = EXACT.bytes // 3
    found = calibrate(tiny_models.llama(), BATCHES, LINEARS, NEED, memory_budget=budget, exact=True)
    assert found.report.passes > 1
    assert f"exact in {found.report.passes} passes" in found.report.reason
    assert list(found) == LINEARS
    assert len(found.groups()) == len(EXACT.groups())
    assert (found.report.tokens, found.report.batches) == (33, 4)
    for name in LINEARS:
        assert torch.equal(found[name].second_moment(), EXACT[name].second_moment())


def test_passes_read_a_shuffled_loader_in_the_same_order() -> None:
    rows = [{"input_ids": text} for text in lm.documents((6,) * 9)]
    orders: list[list[int]] = [[]]

    def collate(batch):
        orders[-1].append(int(batch[0]["input_ids"][0]))
        return torch.utils.data.default_collate(batch)

    class Loader(torch.utils.data.DataLoader):
        def __iter__(self):
            orders.append([])
            return super().__iter__()

    loader = Loader(rows, batch_size=2, shuffle=True, collate_fn=collate)
    found = calibrate(tiny_models.llama(), loader, LINEARS, memory_budget=EXACT.bytes // 4, exact=True, max_tokens=30)
    assert len(orders) == found.report.passes + 1 > 2
    assert all(order == orders[1] for order in orders[1:])
    assert {found[name].count for name in LINEARS} == {30}


def test_passes_over_what_can_be_read_once_are_refused_with_the_bytes_of_one() -> None:
    budget = EXACT.bytes // 3
    with pytest.raises(RecipeError, match=f"read only once.*{EXACT.bytes} bytes"):
        calibrate(tiny_models.llama(), iter(BATCHES), LINEARS, NEED, memory_budget=budget, exact=True)
    once = calibrate(tiny_models.llama(), iter(BATCHES), LINEARS, NEED, memory_budget=EXACT.bytes, exact=True)
    assert once.report.tokens == 33


def test_a_budget_too_small_for_one_input_names_the_minimum_and_the_minimum_is_enough() -> None:
    with pytest.raises(RecipeError, match="too small") as caught:
        calibrate(tiny_models.llama(), BATCHES, LINEARS, NEED, memory_budget=100, exact=True)
    minimum = EXACT["model.layers.0.mlp.down_proj"].bytes
    assert f"needs {minimum} bytes" in str(caught.value)
    found = calibrate(tiny_models.llama(), BATCHES, LINEARS, NEED, memory_budget=minimum, exact=True)
    assert max(part.bytes for _, part in found.groups()) <= minimum


def test_without_a_budget_a_sketch_size_asks_for_sketches() -> None:
    found = calibrate(tiny_models.llama(), BATCHES, LINEARS, sketch=8)
    assert not any(found[name].exact for name in LINEARS)
    assert "no memory budget" in found.report.reason
    down = "model.layers.0.mlp.down_proj"
    direct = InputStatistics(96, sketch=8)
    for X in lm.inputs_of(tiny_models.llama(), down, BATCHES):
        direct.add(X.squeeze(0))
    assert relative(found[down].low_rank(), direct.low_rank()) < 1e-6


def test_inputs_too_narrow_for_a_sketch_stay_exact() -> None:
    found = calibrate(tiny_models.llama(), BATCHES, LINEARS, exact=False)
    assert all(found[name].exact for name in LINEARS)
    assert plan_unlimited(LINEARS, exact=False, sketch=None).sketch_of(4096) == AUTO_SKETCH


def test_planned_bytes_of_a_large_model_are_what_is_documented() -> None:
    groups = [(f"{i}.{part}",) for i in range(32) for part in ("attn", "o", "mlp", "down")]
    dims = {group[0]: 11008 if group[0].endswith("down") else 4096 for group in groups}
    plan = plan_within(10**9, groups, dims, Need(), exact=None, sketch=128)
    tests = 4 * 128 * (4096 + 11008)
    assert plan.one_pass_bytes == 32 * 4 * 128 * (3 * 4096 + 11008) + tests
    assert plan.size == 128
    exact = plan_within(13 * 10**9, groups, dims, Need(), exact=None, sketch=128)
    assert exact.size is None
    assert exact.one_pass_bytes < 0.57 * 32 * 4 * (3 * 4096**2 + 11008**2)
