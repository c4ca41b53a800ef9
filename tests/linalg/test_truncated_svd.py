"""Claims about `truncated_svd`, checked against the exact SVD in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import matrix_with_spectrum, orthonormality_error, power_law
from torch.profiler import ProfilerActivity, profile

from llmreg.errors import LlmregError, UnsupportedError, WeightError
from llmreg.linalg import MatrixOperator, ProductOperator, plan_sketch, truncated_svd
from llmreg.linalg.krylov import krylov_projection, ritz_spectrum

RANDOMIZED = ["krylov", "subspace"]
METHODS = [*RANDOMIZED, "exact"]
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}


def residual(W, U, S, Vh):
    return torch.linalg.matrix_norm(W.double() - (U.double() * S.double().unsqueeze(-2)) @ Vh.double())


def optimal_residual(W, rank):
    return torch.linalg.svdvals(W.double())[..., rank:].square().sum(-1).sqrt()


def assert_is_svd(W, rank, U, S, Vh):
    dtype = U.dtype
    assert U.shape == (*W.shape[:-1], rank)
    assert S.shape == (*W.shape[:-2], rank)
    assert Vh.shape == (*W.shape[:-2], rank, W.shape[-1])
    assert U.dtype == S.dtype == Vh.dtype
    assert orthonormality_error(U) < TOLERANCE[dtype]
    assert orthonormality_error(Vh.mT) < TOLERANCE[dtype]
    assert bool((S >= 0).all())
    assert bool((S[..., :-1] >= S[..., 1:]).all())
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    assert bool((largest > 0).all())


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    rank_share=st.floats(0, 1),
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    exponent=st.sampled_from([0.0, 0.6, 2.0]),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**31),
)
def test_any_shape_rank_and_batch_gives_a_near_optimal_svd(m, n, rank_share, batch, dtype, exponent, method, seed):
    rank = max(1, round(rank_share * min(m, n)))
    W = matrix_with_spectrum(m, n, power_law(min(m, n), exponent), batch=batch, dtype=dtype, seed=seed)
    U, S, Vh = truncated_svd(W, rank, method=method, seed=seed)
    assert_is_svd(W, rank, U, S, Vh)
    # Rounding at full rank: sums of up to 90 terms, in the decomposition and in its product; 21 eps were seen.
    slack = 50 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(W.double())
    assert bool((residual(W, U, S, Vh) <= 1.005 * optimal_residual(W, rank) + slack).all())


@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([(300, 300), (420, 280), (280, 420)]),
    rank=st.sampled_from([1, 4, 16, 33, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    method=st.sampled_from(RANDOMIZED),
    seed=st.integers(0, 2**31),
)
def test_the_sketch_is_within_half_a_permille_of_optimal_on_a_power_law(shape, rank, dtype, method, seed):
    W = matrix_with_spectrum(*shape, power_law(min(shape)), dtype=dtype, seed=seed)
    U, S, Vh = truncated_svd(W, rank, method=method, seed=seed)
    assert_is_svd(W, rank, U, S, Vh)
    assert residual(W, U, S, Vh) <= 1.0005 * optimal_residual(W, rank)


@pytest.mark.parametrize("method", RANDOMIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separated_components_agree_with_the_exact_ones(method, dtype):
    spectrum = torch.cat([torch.linspace(4, 2, 8), 0.1 * power_law(292).float()])
    W = matrix_with_spectrum(350, 300, spectrum, dtype=dtype)
    U, S, Vh = truncated_svd(W, 8, method=method)
    exact_U, exact_S, exact_Vh = truncated_svd(W.double(), 8, method="exact")
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(S.double(), exact_S, rtol=tolerance, atol=0)
    torch.testing.assert_close(U.double(), exact_U, rtol=0, atol=tolerance)
    torch.testing.assert_close(Vh.double(), exact_Vh, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_global_rng_is_untouched(method):
    W = torch.randn(300, 280)
    before = torch.get_rng_state()
    truncated_svd(W, 8, method=method)
    truncated_svd(torch.zeros(300, 280), 8, method=method)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_global_cuda_rng_is_untouched_and_the_device_is_kept():
    W = matrix_with_spectrum(400, 300, power_law(300), batch=(3,), dtype=torch.float32).cuda()
    before = torch.cuda.get_rng_state()
    U, S, Vh = truncated_svd(W, 16)
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert {U.device, S.device, Vh.device} == {W.device}
    assert bool((residual(W.cpu(), U.cpu(), S.cpu(), Vh.cpu()) <= 1.001 * optimal_residual(W.cpu(), 16)).all())


_HASH_SCRIPT = """
import hashlib, torch
from llmreg.linalg import truncated_svd
torch.set_num_threads(1)
torch.manual_seed(1)
W = torch.sin(torch.arange(300 * 280, dtype=torch.float32) ** 1.3).reshape(300, 280)
parts = [*truncated_svd(W, 8, seed=5), *truncated_svd(W, 8, seed=5, method="subspace")]
parts += truncated_svd(torch.ones(300, 280), 8, seed=5)
digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
"""


def test_another_process_and_another_global_seed_give_the_same_bits():
    here: dict[str, str] = {}
    exec(_HASH_SCRIPT.replace("manual_seed(1)", "manual_seed(2)"), here)
    command = [sys.executable, "-c", _HASH_SCRIPT + "print(digest)"]
    there = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert there.stdout.strip() == here["digest"]


def test_another_seed_gives_another_sketch_but_the_same_components():
    W = matrix_with_spectrum(300, 280, power_law(280, 2.0))
    one, two = truncated_svd(W, 4, seed=1), truncated_svd(W, 4, seed=2)
    assert not torch.equal(one[0], two[0])
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_each_matrix_alone_gives(method):
    W = matrix_with_spectrum(290, 270, power_law(270, 1.5), batch=(2, 2), dtype=torch.float64)
    U, S, Vh = truncated_svd(W, 6, method=method, power_iterations=6, seed=3)
    for i in range(2):
        for j in range(2):
            alone = truncated_svd(W[i, j], 6, method=method, power_iterations=6, seed=3)
            for whole, single in zip((U, S, Vh), alone, strict=True):
                torch.testing.assert_close(whole[i, j], single, rtol=0, atol=1e-10)


def test_the_default_spends_as_many_blocks_as_the_spectrum_needs(monkeypatch):
    """A steep spectrum ends early, a Gaussian one late, and both end within the tolerance."""
    columns = []

    def recorded(*args, **kwargs):
        projection = krylov_projection(*args, **kwargs)
        columns.append(projection.V.shape[-1])
        return projection

    monkeypatch.setattr("llmreg.linalg.svd.krylov_projection", recorded)
    gaussian = torch.randn(600, 700, generator=torch.Generator().manual_seed(0))
    for W in (matrix_with_spectrum(600, 700, power_law(600, 2.0), dtype=torch.float32), gaussian):
        U, S, Vh = truncated_svd(W, 16)
        assert residual(W, U, S, Vh) <= 1.0005 * optimal_residual(W, 16)
    assert columns[0] < columns[1]
    truncated_svd(torch.stack([W, gaussian]), 16)
    assert columns[2] >= columns[1]


def test_blocks_that_run_out_just_before_the_estimate_is_small_enough_all_count(monkeypatch):
    """The spectrum that was computed for the last estimate is not taken for that of the whole basis."""
    monkeypatch.setattr("llmreg.linalg.svd._MOST_BLOCKS", 5)
    monkeypatch.setattr("llmreg.linalg.svd._TOLERANCE", 5e-5)
    monkeypatch.setattr("llmreg.linalg.stopping._NEAR", 1e9)
    W = matrix_with_spectrum(600, 560, power_law(560, 0.3), dtype=torch.float32)
    U, S, Vh = truncated_svd(W, 16)
    assert_is_svd(W, 16, U, S, Vh)
    assert residual(W, U, S, Vh) <= 1.0005 * optimal_residual(W, 16)


def test_ritz_vectors_are_orthonormal_though_the_basis_is_not_quite():
    generator = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(200, 24, generator=generator, dtype=torch.float64)).Q
    V = V @ (torch.eye(24) + 1e-3 * torch.randn(24, 24, generator=generator, dtype=torch.float64))
    P = matrix_with_spectrum(150, 200, power_law(150)) @ V
    values, vectors = ritz_spectrum(V, P.mT @ P)
    assert orthonormality_error(V @ vectors) < 1e-6
    torch.testing.assert_close((P @ vectors).square().sum(0), values, rtol=1e-5, atol=0)
    exact = torch.linalg.svdvals(P @ torch.linalg.inv(torch.linalg.qr(V).R)).square().flip(0)
    torch.testing.assert_close(values, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(600, 560), (560, 600), (380, 380), (2, 380, 520)])
@pytest.mark.parametrize("exponent", [0.3, 0.6])
def test_the_residual_is_that_of_sixteen_power_iterations_or_lower(shape, exponent):
    """The call of PEFT's `pissa_niter_16`, to 1e-4: where it is lower, both are well within the tolerance."""
    *batch, m, n = shape
    W = matrix_with_spectrum(m, n, power_law(min(m, n), exponent), batch=tuple(batch), dtype=torch.float32)
    torch.manual_seed(0)
    peer_U, peer_S, peer_V = torch.svd_lowrank(W, q=16, niter=16)
    ours, peers = residual(W, *truncated_svd(W, 16)), residual(W, peer_U, peer_S, peer_V.mT)
    assert bool((ours <= 1.0001 * peers).all())


def test_small_matrices_reach_the_tolerance_without_estimating_the_residual():
    for exponent in (0.1, 0.3, 0.6, 1.0):
        W = matrix_with_spectrum(384, 512, power_law(384, exponent), dtype=torch.float32)
        U, S, Vh = truncated_svd(W, 16)
        assert residual(W, U, S, Vh) <= 1.0005 * optimal_residual(W, 16)


@pytest.mark.parametrize("method", METHODS)
def test_the_transpose_has_the_same_singular_values(method):
    W = matrix_with_spectrum(400, 270, power_law(270))
    tall, wide = truncated_svd(W, 8, method=method), truncated_svd(W.mT, 8, method=method)
    torch.testing.assert_close(tall[1], wide[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_and_returned_in_float32(dtype, method):
    W = matrix_with_spectrum(300, 280, power_law(280)).to(dtype)
    half, single = truncated_svd(W, 8, method=method), truncated_svd(W.float(), 8, method=method)
    for a, b in zip(half, single, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(300, 280), (280, 300), (20, 30), (2, 280, 300)])
def test_a_zero_matrix_has_orthonormal_vectors_and_zero_values(method, shape):
    U, S, Vh = truncated_svd(torch.zeros(shape), 8, method=method)
    assert bool((S == 0).all())
    assert orthonormality_error(U) < 5e-6
    assert orthonormality_error(Vh.mT) < 5e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("true_rank", [1, 3, 20])
def test_a_rank_beyond_the_numerical_one_stays_orthonormal_with_zero_values(method, dtype, true_rank):
    spectrum = torch.zeros(280, dtype=torch.float64)
    spectrum[:true_rank] = power_law(true_rank)
    W = matrix_with_spectrum(300, 280, spectrum, dtype=dtype)
    U, S, Vh = truncated_svd(W, 32, method=method)
    assert_is_svd(W, 32, U, S, Vh)
    assert S[true_rank:].max() < 10 * torch.finfo(dtype).eps
    assert residual(W, U, S, Vh) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spectrum_over_twelve_decades_is_exact_to_rounding(method, dtype):
    W = matrix_with_spectrum(300, 280, 10.0 ** -(torch.arange(280, dtype=torch.float64) * 12 / 280), dtype=dtype)
    U, S, Vh = truncated_svd(W, 64, method=method)
    assert_is_svd(W, 64, U, S, Vh)
    exact = torch.linalg.svdvals(W.double())
    assert (S.double() - exact[:64]).abs().max() < 200 * torch.finfo(dtype).eps
    assert residual(W, U, S, Vh) < 1.001 * optimal_residual(W, 64) + 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", RANDOMIZED)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_a_tiny_or_huge_scale_changes_only_the_values(method, factor):
    W = matrix_with_spectrum(300, 280, power_law(280), dtype=torch.float32)
    U, S, Vh = truncated_svd(W, 8, method=method, power_iterations=5)
    scaled_U, scaled_S, scaled_Vh = truncated_svd(W * factor, 8, method=method, power_iterations=5)
    torch.testing.assert_close(scaled_S / factor, S, rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled_U, U, rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled_Vh, Vh, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_identity_and_equal_columns_do_not_break_it(method):
    for W in (torch.eye(300), torch.ones(300, 280), torch.eye(300)[:, :280] + 1):
        U, S, Vh = truncated_svd(W, 12, method=method)
        exact = torch.linalg.svdvals(W.double())[:12]
        torch.testing.assert_close(S.double(), exact, rtol=1e-5, atol=1e-5 * exact[0].item())
        assert orthonormality_error(U) < 3e-5  # LAPACK's own error on the matrix of ones is 1e-5
        assert orthonormality_error(Vh.mT) < 3e-5


def test_the_full_rank_is_the_exact_svd():
    W = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, Vh = truncated_svd(W, 40)
    torch.testing.assert_close((U * S) @ Vh, W, rtol=0, atol=1e-12)
    assert torch.equal(S, truncated_svd(W, 40, method="exact")[1])


def test_the_input_and_its_gradient_flag_are_left_alone():
    W = torch.nn.Parameter(torch.randn(300, 280, generator=torch.Generator().manual_seed(0)))
    before = W.detach().clone()
    for method in METHODS:
        U, S, Vh = truncated_svd(W, 8, method=method)
        assert not any(part.requires_grad for part in (U, S, Vh))
    assert torch.equal(W, before)


def test_a_strided_weight_gives_what_its_copy_gives():
    W = matrix_with_spectrum(300, 280, power_law(280), dtype=torch.float32)
    padded = torch.zeros(300, 400)
    padded[:, 50:330] = W
    for a, b in zip(truncated_svd(padded[:, 50:330], 8), truncated_svd(W, 8), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", RANDOMIZED)
@pytest.mark.parametrize("shapes", [((300, 280), (280, 280)), ((280, 300), (300, 300)), ((300, 60), (60, 280))])
def test_a_product_is_decomposed_without_forming_it(method, shapes, monkeypatch):
    factors = [matrix_with_spectrum(*shape, power_law(min(shape)), seed=i) for i, shape in enumerate(shapes)]
    product = factors[0] @ factors[1]
    monkeypatch.setattr(ProductOperator, "dense", lambda self: pytest.fail("the product was formed"))
    U, S, Vh = truncated_svd(ProductOperator(*factors), 8, method=method)
    assert_is_svd(product, 8, U, S, Vh)
    assert residual(product, U, S, Vh) <= 1.0005 * optimal_residual(product, 8)


def test_no_single_allocation_comes_near_the_size_of_a_float32_weight():
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        truncated_svd(W, 8)
    assert max(event.self_cpu_memory_usage for event in profiler.events()) < W.nbytes / 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_one_bad_entry_raises_a_weight_error(method, value, dtype):
    W = torch.ones(300, 280, dtype=dtype)
    W[299, 1] = value
    with pytest.raises(WeightError, match="NaN or Inf"):
        truncated_svd(W, 4, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, -1, 31, 2.0, True, None])
def test_a_rank_that_does_not_fit_raises_a_weight_error(method, rank):
    with pytest.raises(WeightError, match="rank"):
        truncated_svd(torch.ones(40, 30), rank, method=method)


@pytest.mark.parametrize(
    "W",
    [
        torch.ones(5),
        torch.ones(3, 3, dtype=torch.int64),
        torch.ones(3, 3, dtype=torch.complex64),
        torch.ones(3, 3, device="meta"),
        torch.eye(3).to_sparse(),
    ],
    ids=["vector", "integer", "complex", "meta", "sparse"],
)
def test_what_is_no_dense_real_matrix_is_refused(W):
    with pytest.raises(UnsupportedError):
        truncated_svd(W, 1)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4)])
def test_an_empty_matrix_is_refused(shape):
    with pytest.raises(WeightError, match="nothing to decompose"):
        truncated_svd(torch.ones(shape), 1)


@pytest.mark.parametrize(
    "options",
    [{"method": "lanczos"}, {"oversample": -1}, {"oversample": 1.5}, {"power_iterations": -1}],
    ids=str,
)
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(UnsupportedError, match=next(iter(options))):
        truncated_svd(torch.ones(40, 30), 2, **options)


def test_what_is_neither_tensor_nor_operator_is_refused():
    with pytest.raises(LlmregError):
        truncated_svd([[1.0]], 1)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        ProductOperator(torch.ones(3, 4), torch.ones(5, 3))
    with pytest.raises(UnsupportedError):
        ProductOperator()


@pytest.mark.parametrize("method", RANDOMIZED)
def test_more_oversampling_or_iterations_do_not_hurt(method):
    W = torch.randn(300, 280, generator=torch.Generator().manual_seed(0))
    errors = [
        residual(W, *truncated_svd(W, 8, method=method, oversample=oversample, power_iterations=iterations))
        for oversample, iterations in [(0, 0), (8, 1), (16, 3), (24, 5)]
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1.001 * optimal_residual(W, 8)


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 33, 64, 128])
def test_every_plan_holds_the_rank_with_room_to_spare(rank):
    for method in ("krylov", "subspace"):
        plan = plan_sketch(rank, method=method)
        assert plan.columns >= rank + max(16, rank // 2)
    assert plan_sketch(rank, oversample=10, power_iterations=4, method="subspace").passes == 10
    assert plan_sketch(rank, oversample=10, power_iterations=4, method="krylov").passes == 10


def test_operators_multiply_like_their_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    W, C = torch.randn(7, 5, generator=generator), torch.randn(5, 6, generator=generator)
    X, Y = torch.randn(6, 2, generator=generator), torch.randn(7, 2, generator=generator)
    product = ProductOperator(W, C)
    torch.testing.assert_close(product.matmul(X), (W @ C) @ X)
    torch.testing.assert_close(product.rmatmul(Y), (W @ C).mT @ Y)
    torch.testing.assert_close(product.dense(), W @ C)
    assert product.shape == (7, 6)
    assert MatrixOperator(W).dense().data_ptr() == W.data_ptr()
