"""Claims about `smallest_svd`, checked against the tail of the exact SVD in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import matrix_with_spectrum, orthonormality_error, power_law

from llmreg.errors import UnsupportedError, WeightError
from llmreg.linalg import MatrixOperator, ProductOperator, smallest_svd

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def spectra(k: int) -> dict[str, torch.Tensor]:
    index = torch.arange(k, dtype=torch.float64)
    return {
        "linear": 1 - index / (k + 1),
        "graded": 10 ** (-6 * index / k),
        "gap": torch.cat([torch.linspace(1, 0.5, k - 10), torch.linspace(0.02, 0.001, 10)]).double(),
        "singular": torch.cat([torch.ones(k - 10), torch.zeros(10)]).double(),
        "very singular": torch.cat([torch.ones(k // 2), torch.zeros(k - k // 2)]).double(),
        "zero": torch.zeros(k, dtype=torch.float64),
    }


def assert_is_tail(dense, rank, U, S, Vh, *, slack=60.0):
    """Orthonormal factors, values of the tail, and `A v = sigma u`, `A^T u = sigma v`, to `slack * eps * sigma_1`."""
    eps = EPS[U.dtype]
    exact = torch.linalg.svdvals(dense.double())
    limit = slack * eps * exact[..., :1]
    assert orthonormality_error(U) < 50 * eps
    assert orthonormality_error(Vh.mT) < 50 * eps
    assert bool((S[..., :-1] >= S[..., 1:]).all())
    assert bool(((S.double() - exact[..., -rank:]).abs() <= limit).all())
    U, S, V, A = U.double(), S.double().unsqueeze(-2), Vh.double().mT, dense.double()
    assert bool((torch.linalg.matrix_norm(A @ V - U * S) <= limit.squeeze(-1)).all())
    assert bool((torch.linalg.matrix_norm(A.mT @ U - V * S) <= limit.squeeze(-1)).all())


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    rank_share=st.floats(0, 1),
    batch=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_any_small_shape_gives_the_tail_of_the_exact_svd(m, n, rank_share, batch, dtype, seed):
    rank = max(1, round(rank_share * min(m, n)))
    W = matrix_with_spectrum(m, n, power_law(min(m, n)), batch=batch, dtype=dtype, seed=seed)
    assert_is_tail(W, rank, *smallest_svd(W, rank, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(260, 200), (200, 260), (200, 200)], ids=str)
@pytest.mark.parametrize("name", spectra(20))
def test_inverse_iteration_finds_the_tail_of_every_kind_of_spectrum(name, shape, dtype):
    W = matrix_with_spectrum(*shape, spectra(200)[name], dtype=dtype)
    slack = 1e8 if dtype == torch.float64 and name in ("linear", "graded") else 100.0  # 20 to 75, by the seed
    assert_is_tail(W, 8, *smallest_svd(W, 8), slack=slack)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(240, 180), (180, 240), (200, 200)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    samples=st.sampled_from([4, 150, 1000]),
    damping=st.sampled_from([0.0, 0.01]),
    seed=st.integers(0, 2**31),
)
def test_the_tail_of_weight_times_covariance_needs_no_inverse(shape, dtype, samples, damping, seed):
    """CorDA's `W C`, with few samples so that `C` is singular. Values to 1 % of the exact tail or to rounding."""
    W = matrix_with_spectrum(*shape, power_law(min(shape)), dtype=dtype, seed=seed)
    X = torch.randn(samples, shape[1], dtype=dtype, generator=torch.Generator().manual_seed(seed))
    C = X.mT @ X / samples
    C = C + damping * C.diagonal().mean() * torch.eye(shape[1], dtype=dtype)
    U, S, Vh = smallest_svd(ProductOperator(W, C), 8, seed=seed)
    dense = W.double() @ C.double()
    exact = torch.linalg.svdvals(dense)
    rounding = 60 * EPS[dtype] * exact[0]
    assert orthonormality_error(U) < 50 * EPS[dtype]
    assert orthonormality_error(Vh.mT) < 50 * EPS[dtype]
    assert bool(((S.double() - exact[-8:]).abs() <= 0.015 * exact[-8:] + rounding).all())
    energy = torch.linalg.matrix_norm(dense @ Vh.double().mT)
    assert energy <= 1.015 * exact[-8:].square().sum().sqrt() + 8 * rounding
    assert torch.linalg.matrix_norm(dense.mT @ U.double()) <= 1.015 * exact[-8:].square().sum().sqrt() + 8 * rounding


def test_small_values_keep_digits_that_the_gram_matrix_would_lose():
    """sigma_n / sigma_1 = 1e-5 in float32: its square is below rounding, the value itself is found to 1 %."""
    spectrum = torch.cat([torch.linspace(1, 0.5, 190), torch.full((10,), 1e-5)]).double()
    spectrum[-10:] *= torch.linspace(2, 1, 10).double()
    W = matrix_with_spectrum(240, 200, spectrum, dtype=torch.float32)
    _, S, _ = smallest_svd(W, 8)
    torch.testing.assert_close(S.double(), torch.linalg.svdvals(W.double())[-8:], rtol=0.02, atol=0)


def test_a_flat_tail_is_found_to_one_percent():
    W = matrix_with_spectrum(300, 250, power_law(250), dtype=torch.float32)
    _, S, _ = smallest_svd(W, 8)
    torch.testing.assert_close(S.double(), torch.linalg.svdvals(W.double())[-8:], rtol=0.02, atol=0)


def test_batches_seeds_and_the_global_rng():
    W = matrix_with_spectrum(230, 210, spectra(210)["gap"], batch=(3,))
    before = torch.get_rng_state()
    whole = smallest_svd(W, 4, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    for part, again in zip(whole, smallest_svd(W, 4, seed=7), strict=True):
        assert torch.equal(part, again)
    for i in range(3):
        for part, single in zip(whole, smallest_svd(W[i], 4, seed=7), strict=True):
            torch.testing.assert_close(part[i], single, rtol=0, atol=1e-10)


def test_scaling_changes_only_the_values():
    W = matrix_with_spectrum(230, 210, spectra(210)["gap"], dtype=torch.float32)
    _, S, Vh = smallest_svd(W, 4)
    for factor in (1e-30, 1e30):
        _, scaled_S, scaled_Vh = smallest_svd(W * factor, 4)
        torch.testing.assert_close(scaled_S / factor, S, rtol=1e-3, atol=0)
        torch.testing.assert_close(scaled_Vh, Vh, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [20, 200])
def test_bad_entries_raise_a_weight_error(value, size):
    W = torch.eye(size)
    W[1, 1] = value
    with pytest.raises(WeightError, match="NaN or Inf"):
        smallest_svd(W, 2)
    with pytest.raises(WeightError, match="NaN or Inf"):
        smallest_svd(ProductOperator(torch.eye(size), W), 2)


def test_bad_ranks_and_narrow_products_are_refused():
    with pytest.raises(WeightError, match="rank"):
        smallest_svd(torch.ones(4, 3), 4)
    with pytest.raises(UnsupportedError, match="inner dimensions"):
        smallest_svd(ProductOperator(torch.ones(6, 2), torch.ones(2, 5)), 1)
    with pytest.raises(UnsupportedError):
        smallest_svd(MatrixOperator(torch.ones(4, 3)), 1)  # type: ignore[arg-type]
