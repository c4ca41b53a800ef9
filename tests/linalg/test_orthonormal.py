"""Claims about Cholesky-QR, orthonormalisation, signs and sketches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import matrix_with_spectrum, orthonormality_error

from llmreg.errors import WeightError
from llmreg.linalg import cholesky_qr, fix_signs, gaussian_sketch, make_generator
from llmreg.linalg.orthonormal import extend, one_round, orthonormalize

LIMIT = {torch.float32: 3e-6, torch.float64: 1e-14}


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 120),
    share=st.floats(0, 1),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    decades=st.sampled_from([0, 1, 2, 4, 7, 12, 20]),
    scale=st.sampled_from([1.0, 1e-25, 1e15]),
    seed=st.integers(0, 2**31),
)
def test_cholesky_qr_is_orthonormal_and_exact_at_any_condition_number(m, share, batch, dtype, decades, scale, seed):
    k = max(1, round(share * m))
    spectrum = 10.0 ** -(torch.arange(k, dtype=torch.float64) * decades / max(1, k - 1))
    X = matrix_with_spectrum(m, k, spectrum, batch=batch, dtype=dtype, seed=seed) * scale
    Q, R = cholesky_qr(X)
    assert orthonormality_error(Q) < LIMIT[dtype]
    assert torch.equal(R, R.triu())
    assert bool((R.diagonal(dim1=-2, dim2=-1) >= 0).all())
    assert (Q @ R - X).abs().max() <= 30 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(
    "X", [torch.zeros(6, 3), torch.ones(6, 3), torch.eye(6)[:, [0, 0, 1]]], ids=["0", "1", "twice"]
)
def test_cholesky_qr_of_dependent_columns_is_still_orthonormal(X):
    Q, R = cholesky_qr(X)
    assert orthonormality_error(Q) < 3e-6
    torch.testing.assert_close(Q @ R, X)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 80),
    known_share=st.floats(0, 1),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from(["random", "zero", "inside", "nearly inside", "graded", "one batch member inside"]),
    seed=st.integers(0, 2**31),
)
def test_new_columns_are_orthonormal_to_each_other_and_to_the_basis(m, known_share, share, dtype, kind, seed):
    known = min(m - 1, max(1, round(known_share * m)))
    k = max(1, round(share * (m - known)))
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(2, m, known, generator=generator, dtype=dtype))
    X = torch.randn(2, m, k, generator=generator, dtype=dtype)
    inside = basis @ torch.randn(2, known, k, generator=generator, dtype=dtype)
    if kind == "zero":
        X = torch.zeros_like(X)
    elif kind == "inside":
        X = inside
    elif kind == "nearly inside":
        X = inside + 10 * torch.finfo(dtype).eps * X
    elif kind == "graded":
        X = X * 10.0 ** -torch.arange(k, dtype=dtype)
    elif kind == "one batch member inside":
        X[0] = inside[0]
    Q = orthonormalize(X, against=basis, generator=make_generator(seed))
    assert orthonormality_error(Q) < LIMIT[dtype]
    assert (basis.mT @ Q).abs().max() < LIMIT[dtype]
    if kind == "random" and k < m - known:
        outside = X - basis @ (basis.mT @ X)
        assert (Q @ (Q.mT @ outside) - outside).abs().max() < 1e3 * LIMIT[dtype]


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(8, 120),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    decades=st.sampled_from([0, 1, 2, 4, 9]),
    scale=st.sampled_from([1.0, 1e-20, 1e15]),
    seed=st.integers(0, 2**31),
)
def test_one_round_is_nearly_orthonormal_or_says_that_it_would_not_be(m, batch, dtype, decades, scale, seed):
    spectrum = 10.0 ** -(torch.arange(6, dtype=torch.float64) * decades / 5)
    X = matrix_with_spectrum(m, 6, spectrum, batch=batch, dtype=dtype, seed=seed) * scale
    Q = one_round(X)
    assert (Q is not None) or decades > 1 or scale != 1
    if Q is not None:
        assert orthonormality_error(Q) < 1e-2
        assert (Q @ torch.linalg.lstsq(Q, X).solution - X).abs().max() < 1e3 * LIMIT[dtype]


def test_one_round_refuses_what_has_no_cholesky_factor():
    for X in (torch.zeros(6, 3), torch.ones(6, 3), torch.full((6, 3), float("nan")), torch.full((6, 3), float("inf"))):
        assert one_round(X) is None


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(12, 80),
    batch=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    outside=st.sampled_from([1.0, 1e-2, 1e-5, 0.0]),
    seed=st.integers(0, 2**31),
)
def test_a_basis_is_extended_whatever_share_of_the_new_columns_lies_in_it(m, batch, dtype, outside, seed):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(*batch, m, 5, generator=generator, dtype=dtype))
    new = torch.randn(*batch, m, 4, generator=generator, dtype=dtype)
    Z = basis @ torch.randn(*batch, 5, 4, generator=generator, dtype=dtype) + outside * (new - basis @ (basis.mT @ new))
    Q = extend(Z.clone(), basis, basis.mT @ Z, generator=make_generator(seed))
    assert orthonormality_error(torch.cat([basis, Q], dim=-1)) < 2e-2
    both = torch.linalg.qr(torch.cat([basis, Q], dim=-1)).Q
    assert (both @ (both.mT @ Z) - Z).abs().max() < 1e3 * LIMIT[dtype]


def test_columns_that_are_not_finite_do_not_extend_a_basis():
    basis = torch.eye(6)[:, :2]
    Z = torch.full((6, 2), float("inf"))
    with pytest.raises(WeightError, match="NaN or Inf"):
        extend(Z, basis, basis.mT @ Z, generator=make_generator(0))


def test_signs_make_the_largest_entry_of_each_left_vector_positive_and_keep_the_product():
    U = torch.tensor([[0.6, -0.1], [-0.8, 0.2], [0.0, -0.9]])
    Vh = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    fixed_U, fixed_Vh = fix_signs(U, Vh)
    torch.testing.assert_close(fixed_U, -U)
    torch.testing.assert_close(fixed_U @ fixed_Vh, U @ Vh)


def test_a_tie_is_broken_by_the_first_entry():
    U = torch.tensor([[-0.5], [0.5], [-0.5], [0.5]])
    assert fix_signs(U, torch.ones(1, 2))[0][0, 0] == 0.5
    assert fix_signs(-U, torch.ones(1, 2))[0][0, 0] == 0.5


def test_signs_are_idempotent_and_flip_invariant_in_a_batch():
    generator = torch.Generator().manual_seed(0)
    U, Vh = torch.randn(3, 9, 4, generator=generator), torch.randn(3, 4, 7, generator=generator)
    once = fix_signs(U, Vh)
    flips = torch.where(torch.rand(3, 1, 4, generator=generator) < 0.5, -1.0, 1.0)
    for again in (fix_signs(*once), fix_signs(U * flips, Vh * flips.mT)):
        assert torch.equal(once[0], again[0])
        assert torch.equal(once[1], again[1])


def test_a_sketch_depends_on_its_generator_only():
    torch.manual_seed(1)
    one = gaussian_sketch(5, 3, generator=make_generator(9))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = gaussian_sketch(5, 3, generator=make_generator(9), dtype=torch.float64)
    assert torch.equal(one.double(), two)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one, gaussian_sketch(5, 3, generator=make_generator(10)))
    assert gaussian_sketch(2, 2, generator=make_generator(-(2**70))).isfinite().all()
