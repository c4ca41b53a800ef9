"""CorDA++'s selection and allocation as this package reads them from a secondary source: on spectra alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmreg.errors import RecipeError, WeightError
from llmreg.initializers import allocate_ranks, compactness, select_covariance


def test_the_compactness_is_the_formula():
    assert compactness(torch.tensor([9.0, 4.0, 0.5]), 4) == pytest.approx(math.sqrt(4 * 9) / 0.5)


def test_a_singular_spectrum_counts_its_rounding_and_not_infinity():
    value = compactness(torch.tensor([1.0, 0.0]), 4)
    assert value == pytest.approx(2 / torch.finfo(torch.float64).eps)


def test_the_candidate_with_the_smaller_tail_and_the_flatter_spectrum_is_selected():
    flat_tail = torch.tensor([1.0, 0.5, 0.4, 0.4])
    small_tail = torch.tensor([1.0, 0.5, 0.1, 0.1])
    for first, second, expected in ((flat_tail, small_tail, 1), (small_tail, flat_tail, 0)):
        assert select_covariance([first, second], 2, 16) == expected
    # Equal tails: the compactness decides, and it can be taken of another matrix.
    assert select_covariance([flat_tail, flat_tail], 2, 16) == 0
    compact, spread = torch.tensor([1.0, 0.9]), torch.tensor([1.0, 0.1])
    assert select_covariance([flat_tail] * 2, 2, 16, moment_spectra=[spread, compact]) == 1


def test_the_allocation_repeats_the_greedy_rule_step_by_step():
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (12, 12), "up": (30, 12), "down": (12, 30)}
    spectra = {
        name: (torch.rand(12, generator=generator, dtype=torch.float64) + 0.01).sort(descending=True).values
        for name in shapes
    }
    rank, ranks = 4, dict.fromkeys(shapes, 1)
    budget = rank * sum(map(sum, shapes.values()))

    def score(name):
        values, r = spectra[name], ranks[name]
        return math.log(compactness(values, shapes[name][0])) * values[-r] / values[: len(values) - r].sum()

    while True:
        spent = sum(ranks[name] * sum(shapes[name]) for name in shapes)
        open_ = [name for name in shapes if ranks[name] < 12 and spent + sum(shapes[name]) <= budget]
        if not open_:
            break
        ranks[min(open_, key=score)] += 1
    assert allocate_ranks(spectra, shapes, rank) == ranks
    assert len(set(ranks.values())) > 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layers=st.integers(1, 6), rank=st.integers(1, 8))
def test_the_budget_of_parameters_is_kept_and_nearly_used_and_every_layer_has_a_rank(data, layers, rank):
    sizes = st.integers(8, 24)
    shapes = {f"layer{i}": (data.draw(sizes), data.draw(sizes)) for i in range(layers)}
    values = st.floats(1e-3, 10.0)
    spectra = {
        name: torch.tensor(
            sorted(data.draw(st.lists(values, min_size=min(s), max_size=min(s))), reverse=True), dtype=torch.float64
        )
        for name, s in shapes.items()
    }
    ranks = allocate_ranks(spectra, shapes, rank)
    budget = rank * sum(map(sum, shapes.values()))
    spent = sum(ranks[name] * sum(shapes[name]) for name in shapes)
    assert list(ranks) == list(shapes)
    assert all(1 <= ranks[name] <= min(shapes[name]) for name in shapes)
    assert spent <= budget
    for name in shapes:
        assert ranks[name] == min(shapes[name]) or spent + sum(shapes[name]) > budget


def test_equal_layers_share_the_ranks_equally():
    spectrum = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    names = ["a", "b", "c"]
    assert set(allocate_ranks(dict.fromkeys(names, spectrum), dict.fromkeys(names, (5, 5)), 3).values()) == {3}


def test_bad_spectra_and_missing_shapes_are_refused():
    with pytest.raises(WeightError, match="'q'"):
        allocate_ranks({"q": torch.tensor([float("nan"), 1.0])}, {"q": (4, 4)}, 2)
    with pytest.raises(RecipeError, match="'q'"):
        allocate_ranks({"q": torch.ones(4)}, {}, 2)
    with pytest.raises(RecipeError, match="rank is 0"):
        allocate_ranks({"q": torch.ones(4)}, {"q": (4, 4)}, 0)
    with pytest.raises(RecipeError, match="0 spectra"):
        select_covariance([], 2, 4)
    with pytest.raises(WeightError):
        compactness(torch.zeros(3), 4)
