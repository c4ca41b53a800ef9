"""SORSA's and SVFit's start: the singular components themselves, by slices too, and the rank that holds a share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmreg.initializers import pissa, rank_of_energy, singular_components, sliced_components


def with_spectrum(values, out, width, *, seed=0, dtype=torch.float64):
    """`(out, width)` with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    U, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(width, len(values), generator=generator, dtype=torch.float64))
    return ((U * values) @ V.T).to(dtype)


def decaying(out, width, *, power=0.6, seed=0, dtype=torch.float64):
    values = torch.arange(1, min(out, width) + 1, dtype=torch.float64) ** -power
    return with_spectrum(values, out, width, seed=seed, dtype=dtype)


def truncated(W, rank):
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def product(factors):
    return (factors.B * factors.singular_values.unsqueeze(-2)) @ factors.A


# -- singular components ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
def test_the_product_is_the_principal_part_and_the_values_are_the_largest(shape):
    W = decaying(*shape)
    factors = singular_components(W, 8, svd="exact")
    torch.testing.assert_close(product(factors), truncated(W, 8), atol=1e-12, rtol=0)
    torch.testing.assert_close(factors.singular_values, torch.linalg.svdvals(W)[:8], atol=1e-12, rtol=0)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(48, 80), (512, 300), (300, 512)])
def test_both_factors_are_orthonormal_to_1e_5_in_float32(shape, svd):
    factors = singular_components(decaying(*shape, dtype=torch.float32), 16, svd=svd)
    for rows in (factors.A, factors.B.T):
        assert rows.dtype == torch.float32
        assert (rows.double() @ rows.double().T - torch.eye(16, dtype=torch.float64)).norm() < 1e-5


def test_the_randomised_start_is_within_a_percent_of_the_best_residual():
    W = decaying(512, 300, dtype=torch.float32)
    best = (W.double() - truncated(W, 16)).norm()
    assert (W.double() - product(singular_components(W, 16)).double()).norm() <= 1.01 * best


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_pissa_is_the_same_components_split_between_its_factors(scaling):
    W = decaying(40, 56)
    ours, theirs = singular_components(W, 6, svd="exact"), pissa(W, 6, scaling, svd="exact")
    root = (ours.singular_values / scaling).sqrt()
    torch.testing.assert_close(theirs.A, root[:, None] * ours.A)
    torch.testing.assert_close(theirs.B, ours.B * root)


def test_a_batch_is_decomposed_like_each_of_its_members():
    W = torch.stack([decaying(32, 24, seed=seed) for seed in range(3)])
    batch = singular_components(W, 4, svd="exact")
    assert (batch.A.shape, batch.B.shape, batch.singular_values.shape) == ((3, 4, 24), (3, 32, 4), (3, 4))
    torch.testing.assert_close(product(batch), truncated(W, 4), atol=1e-12, rtol=0)


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 30), width=st.integers(1, 30), data=st.data())
def test_any_shape_and_rank_gives_orthonormal_factors_of_the_principal_part(out, width, data):
    rank = data.draw(st.integers(1, min(out, width)))
    W = decaying(out, width, power=1.5, seed=31 * out + width)
    factors = singular_components(W, rank, svd=data.draw(st.sampled_from(["exact", "randomized"])))
    best = (W - truncated(W, rank)).norm()
    assert (W - product(factors)).norm() <= 1.001 * best + 1e-10
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(factors.A @ factors.A.T, eye, atol=1e-10, rtol=0)
    torch.testing.assert_close(factors.B.T @ factors.B, eye, atol=1e-10, rtol=0)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("values", [[3.0, 1.0], [0.0]], ids=["rank 2", "zero"])
@pytest.mark.parametrize("shape", [(40, 56), (512, 300), (300, 512)])
def test_the_factors_of_a_weight_without_full_rank_are_orthonormal_too(shape, values, svd):
    factors = singular_components(with_spectrum(values, *shape, dtype=torch.float32), 6, svd=svd)
    for rows in (factors.A, factors.B.T):
        assert (rows @ rows.T - torch.eye(6)).norm() < 1e-5
    spectrum = torch.tensor([*values, *[0.0] * 6])[:6]
    torch.testing.assert_close(factors.singular_values, spectrum, atol=1e-5, rtol=0)


def test_a_rank_larger_than_the_weight_is_refused():
    with pytest.raises(ValueError, match="13"):
        singular_components(decaying(12, 20), 13)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_seed_decides_and_the_global_random_state_does_not(svd):
    W = decaying(600, 320, dtype=torch.float32)
    before = torch.get_rng_state()
    first = singular_components(W, 4, svd=svd, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = singular_components(W, 4, svd=svd, seed=7)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.singular_values, second.singular_values)


# -- slices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (2,)])
def test_slices_are_decomposed_each_on_its_own_and_b_is_block_diagonal(leading):
    slices, per_slice, rows = 3, 2, 10
    W = decaying(30 * (2 if leading else 1), 16).reshape(*leading, 30, 16)
    factors = sliced_components(W, slices * per_slice, slices, svd="exact")
    assert factors.A.shape == (*leading, 6, 16)
    for index in range(slices):
        block, own = slice(index * rows, (index + 1) * rows), slice(index * per_slice, (index + 1) * per_slice)
        alone = singular_components(W[..., block, :], per_slice, svd="exact")
        assert torch.equal(factors.A[..., own, :], alone.A)
        assert torch.equal(factors.B[..., block, own], alone.B)
        assert torch.equal(factors.singular_values[..., own], alone.singular_values)
        elsewhere = torch.ones(30, dtype=torch.bool).index_fill(0, torch.arange(30)[block], False)
        assert not factors.B[..., elsewhere, :][..., own].any(), "B is zero outside its slice's rows"


def test_one_slice_is_no_slicing():
    W = decaying(30, 16)
    sliced, whole = sliced_components(W, 5, 1, svd="exact"), singular_components(W, 5, svd="exact")
    for one, other in zip(vars(sliced).values(), vars(whole).values(), strict=True):
        assert torch.equal(one, other)


# -- the rank that holds a share --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "measure", "rank"),
    [
        (0.99, "squares", 1),  # 100 / 101.01 = 0.9900
        (0.9901, "squares", 2),
        (0.99, "nuclear", 2),  # 11 / 11.1 = 0.9910
        (0.9, "nuclear", 1),  # 10 / 11.1 = 0.9009
        (0.992, "nuclear", 3),
        (1.0, "squares", 3),
        (1e-9, "nuclear", 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_known_spectrum_gives_the_known_rank(share, measure, rank, dtype):
    assert rank_of_energy(torch.tensor([10.0, 1.0, 0.1], dtype=dtype), share, measure) == rank


@pytest.mark.parametrize("measure", ["squares", "nuclear"])
@pytest.mark.parametrize("size", [3, 7, 10, 48])
def test_of_equal_values_a_share_of_k_in_n_needs_exactly_k(size, measure):
    for count in range(1, size + 1):
        assert rank_of_energy(torch.full((size,), 0.3), count / size, measure) == count


def test_the_whole_share_needs_all_values_but_the_zeros():
    assert rank_of_energy(torch.tensor([3.0, 1.0, 0.0, 0.0]), 1.0) == 2
    assert rank_of_energy(torch.zeros(4), 0.99) == 1


spectra = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=40).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)
shares = st.floats(1e-3, 1.0)


@settings(max_examples=100, deadline=None)
@given(spectrum=spectra, share=shares, measure=st.sampled_from(["squares", "nuclear"]))
def test_the_rank_is_the_least_that_holds_the_share(spectrum, share, measure):
    rank = rank_of_energy(spectrum, share, measure)
    weights = spectrum**2 if measure == "squares" else spectrum
    assert 1 <= rank <= len(spectrum)
    assert weights[:rank].sum() >= share * weights.sum() * (1 - 1e-12)
    assert weights[: rank - 1].sum() < share * weights.sum() * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(spectrum=spectra, one=shares, other=shares, exponent=st.integers(-9, 9))
def test_the_rank_grows_with_the_share_and_not_with_the_weight_s_scale(spectrum, one, other, exponent):
    low, high = sorted((one, other))
    for measure in ("squares", "nuclear"):
        assert rank_of_energy(spectrum, low, measure) <= rank_of_energy(spectrum, high, measure)
    # A power of two scales every sum exactly.
    assert rank_of_energy(spectrum * 2.0**exponent, low) == rank_of_energy(spectrum, low)


@settings(max_examples=100, deadline=None)
@given(spectrum=spectra, share=st.floats(1e-3, 0.999))
def test_the_sum_of_the_values_never_asks_for_fewer_than_the_sum_of_their_squares(spectrum, share):
    assert rank_of_energy(spectrum, share, "nuclear") >= rank_of_energy(spectrum, share * (1 - 1e-9), "squares")
