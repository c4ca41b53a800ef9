"""Sums over one layer's input: moments, means and sketches against dense float64 formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmreg.calibration.statistics import InputStatistics, Need
from llmreg.calibration.tokens import TokenRows
from llmreg.errors import LlmregError, RecipeError, UnsupportedError


def tokens(count: int, dim: int, seed: int = 0, decay: float = 0.0) -> torch.Tensor:
    """(count, dim) Gaussian with standard deviations `i^-decay` and a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, dim, generator=generator) + 0.3
    return X * torch.arange(1, dim + 1).pow(-decay)


def gathered(X: torch.Tensor, need: Need | None = None, *, splits: int = 1, **form) -> InputStatistics:
    statistics = InputStatistics(X.shape[1], need, **form)
    for part in X.chunk(splits):
        statistics.add(part)
    return statistics


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 90),
    dim=st.sampled_from([1, 7, 255, 256, 257, 600]),
    splits=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_exact_moments_are_the_dense_formulas(count, dim, splits, dtype) -> None:
    X = tokens(count, dim).to(dtype)
    statistics = gathered(X, Need(mean=True), splits=splits)
    dense = X.double()
    C = statistics.second_moment()
    assert C.dtype == torch.float32
    assert torch.equal(C, C.mT)
    assert relative(C, dense.mT @ dense / count) < 1e-6
    assert (statistics.mean() - dense.mean(0)).norm() < 1e-6 * dense.norm() / count**0.5  # a mean may cancel
    assert statistics.trace == pytest.approx(dense.square().sum().item(), rel=1e-6)
    assert (statistics.count, statistics.samples) == (count, min(splits, len(X.chunk(splits))))


def test_many_small_batches_lose_nothing_to_rounding() -> None:
    X = tokens(20_000, 24).abs()  # sums of one sign, the worst case
    dense = X.double()
    assert relative(gathered(X, splits=2000).second_moment(), dense.mT @ dense / 20_000) < 1e-6


def test_centred_moment_is_the_covariance_even_beside_a_large_mean() -> None:
    X = tokens(4000, 40) + 20
    C = gathered(X, Need(mean=True), splits=8).second_moment(centred=True)
    assert relative(C, torch.cov(X.double().mT, correction=0)) < 1e-3  # 400 times the variance cancels


def test_triangle_takes_little_more_than_half_of_the_square() -> None:
    assert InputStatistics(2816).bytes < 0.56 * 4 * 2816**2


def test_low_precision_matmul_settings_do_not_reach_the_sums() -> None:
    X = tokens(300, 300)
    precise = gathered(X).second_moment()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(gathered(X).second_moment(), precise)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# -- sample scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["signed_max", "abs_max"])
def test_each_sample_is_divided_by_its_own_maximum_over_counted_tokens(kind: str) -> None:
    X = tokens(12, 5) - 0.5
    X[3] = 1000.0  # a token that does not count
    index = torch.tensor([0, 1, 2, 4, 5, 6, 7, 9])
    sample_of = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    statistics = InputStatistics(5, Need(sample_scale=kind, mean=True))
    statistics.add(X, TokenRows(index, sample_of, 8, 3))
    scaled = []
    for sample in range(3):
        part = X[index[sample_of == sample]].double()
        scaled.append(part / (part.max().abs() if kind == "signed_max" else part.abs().max()))
    dense = torch.cat(scaled)
    assert relative(statistics.second_moment() * 8, dense.mT @ dense) < 1e-6
    assert relative(statistics.mean() * 8, dense.sum(0)) < 1e-6
    assert statistics.trace == pytest.approx(dense.square().sum().item(), rel=1e-6)


def test_signed_maximum_is_the_reference_even_where_the_largest_entry_is_negative() -> None:
    X = torch.tensor([[-8.0, 1.0], [2.0, -4.0]])
    assert gathered(X, Need(sample_scale="signed_max")).second_moment()[0, 0] == (64 + 4) / 4 / 2
    assert gathered(X, Need(sample_scale="abs_max")).second_moment()[0, 0] == (64 + 4) / 64 / 2


def test_samples_whose_maximum_is_zero_stay_finite() -> None:
    need = Need(sample_scale="signed_max")
    assert gathered(torch.zeros(3, 4), need).trace == 0
    assert gathered(torch.tensor([[0.0, -2.0]]), need).second_moment()[1, 1] == 1


def test_need_refuses_an_unknown_scale() -> None:
    with pytest.raises(RecipeError, match="signed_max"):
        Need(sample_scale="max")  # type: ignore[arg-type]


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketch", [None, 16])
def test_merging_is_associative_commutative_and_equals_one_pass(sketch: int | None) -> None:
    need = Need(mean=True, sample_scale="abs_max")
    parts = [gathered(tokens(n, 48, seed=n), need, sketch=sketch) for n in (3, 50, 17)]
    merges = [a.merge(b).merge(c) for a, b, c in itertools.permutations(parts)]
    merges.append(parts[0].merge(parts[1].merge(parts[2])))
    for merged in merges:
        assert (merged.count, merged.samples) == (70, 3)
        assert relative(merged.moment.flat, merges[0].moment.flat) < 1e-6
        assert relative(merged.mean(), merges[0].mean()) < 1e-6
        assert merged.trace == pytest.approx(merges[0].trace, rel=1e-9)
    assert parts[0].count == 3
    dense = torch.cat([tokens(n, 48, seed=n) / tokens(n, 48, seed=n).abs().max() for n in (3, 50, 17)]).double()
    assert relative(merges[0].mean(), dense.mean(0)) < 1e-6


@pytest.mark.parametrize(
    "other",
    [
        InputStatistics(9),
        InputStatistics(8, Need(mean=True)),
        InputStatistics(8, sketch=2),
    ],
    ids=["dimension", "need", "form"],
)
def test_statistics_of_another_form_do_not_merge(other: InputStatistics) -> None:
    with pytest.raises(RecipeError, match="cannot be merged"):
        InputStatistics(8).merge(other)


def test_sketches_of_different_seeds_do_not_merge() -> None:
    with pytest.raises(RecipeError, match="cannot be merged"):
        InputStatistics(8, sketch=2).merge(InputStatistics(8, sketch=2, seed=1))


# -- sketch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_sketch_recovers_a_second_moment_whose_rank_fits(rank: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(rank)
    X = torch.randn(400, rank, generator=generator) @ torch.randn(rank, 90, generator=generator) + centred * 2.0
    statistics = gathered(X, Need(mean=True), sketch=24, splits=3)
    F = statistics.low_rank(centred=centred)
    dense = X.double() - centred * X.double().mean(0)
    assert F.shape == (90, 24)
    assert relative(F @ F.mT, dense.mT @ dense / 400) < 2e-4
    assert relative(statistics.second_moment(centred=centred), dense.mT @ dense / 400) < 2e-4


def test_sketch_of_a_decaying_spectrum_is_near_the_best_of_its_rank_and_never_above_the_moment() -> None:
    X = tokens(3000, 200, decay=1.0)
    C = gathered(X).second_moment().double()
    F = gathered(X, sketch=64).low_rank().double()
    values = torch.linalg.eigvalsh(C).flip(0)
    error = torch.linalg.eigvalsh(C - F @ F.mT)
    assert error.sum() < 3 * values[32:].sum()
    assert error.min() > -1e-5 * values[0]


def test_sketch_knows_the_exact_trace() -> None:
    X = tokens(100, 60)
    assert gathered(X, sketch=4).trace == pytest.approx(X.double().square().sum().item(), rel=1e-6)


def test_sketch_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone() -> None:
    X = tokens(50, 60)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = gathered(X, sketch=8, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.moment.flat, gathered(X, sketch=8, seed=5).moment.flat)
    assert not torch.equal(first.moment.flat, gathered(X, sketch=8, seed=6).moment.flat)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda s: InputStatistics(4).second_moment(), "no token"),
        (lambda s: s.mean(), r"Need\(mean=True\)"),
        (lambda s: s.second_moment(centred=True), r"Need\(mean=True\)"),
        (lambda s: s.low_rank(), r"second_moment\(\)"),
    ],
)
def test_what_was_not_gathered_is_refused_with_what_to_ask_for(read, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        read(gathered(tokens(5, 4)))
    assert isinstance(caught.value, LlmregError)


@pytest.mark.parametrize("sketch", [None, 64])
@pytest.mark.parametrize("scale", [None, "signed_max", "abs_max"])
def test_what_tensor_cores_are_given_sums_to_the_same(scale, sketch) -> None:
    X = tokens(1100, 300).bfloat16()
    lengths = torch.tensor([300, 20, 680, 100])
    rows = TokenRows(None, torch.arange(4).repeat_interleave(lengths), 1100, 4)
    need = Need(sample_scale=scale, mean=True)
    usual, half = (InputStatistics(300, need, sketch=sketch, seed=3) for _ in range(2))
    usual.add(X, rows)
    half._add_half(X, rows, None if scale is None else half._scales(X, rows))
    for found, expected in zip(half.parts(), usual.parts(), strict=True):
        assert relative(found, expected) < 1e-6


def test_a_test_matrix_loses_nothing_in_bfloat16() -> None:
    omega = InputStatistics(300, sketch=64).moment.omega
    assert torch.equal(omega, omega.bfloat16().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sketch", [None, 64])
@pytest.mark.parametrize("scale", [None, "signed_max"])
def test_half_precision_sums_on_cuda_equal_those_of_the_cpu(scale, sketch) -> None:
    X = tokens(1024, 700).bfloat16()
    rows = TokenRows(None, torch.arange(2).repeat_interleave(512), 1024, 2)
    need = Need(sample_scale=scale, mean=True)
    here = InputStatistics(700, need, sketch=sketch)
    there = InputStatistics(700, need, sketch=sketch, device="cuda")
    here.add(X, rows)
    there.add(X.cuda(), rows.to(torch.device("cuda")))
    assert relative(there.second_moment().cpu(), here.second_moment()) < 1e-6
    assert relative(there.mean().cpu(), here.mean()) < 1e-6
