"""EoRA (arXiv 2410.21271): the best low-rank correction of a quantised weight on the inputs it will see."""

from __future__ import annotations

import pytest
import torch
from anisotropic import inputs, relative, second_moment, truncated, weight

from llmreg.errors import WeightError
from llmreg.initializers import SecondMoment, eora


def three_levels(W):
    """A coarse quantiser: -1, 0 or 1 times a scale of each row."""
    scale = 1.2 * W.abs().mean(dim=1, keepdim=True)
    return (W / scale).round().clamp(-1, 1) * scale


@pytest.fixture
def layer():
    W = weight(64, 96)
    return W, three_levels(W), inputs(3000, 96, decay=0.8), inputs(3000, 96, decay=0.8)[1500:]


def output_error(W, approximation, X):
    return ((X @ (W - approximation).T) ** 2).mean().item()


def test_it_halves_the_output_error_of_a_plain_svd_of_the_same_rank(layer):
    W, Wq, X, _ = layer
    factors = eora(W, Wq, 8, second_moment(X))
    none, plain = output_error(W, Wq, X), output_error(W, Wq + truncated(W - Wq, 8), X)
    ours = output_error(W, Wq + factors.B @ factors.A, X)
    assert none > plain > ours
    assert ours < 0.6 * plain


def test_also_on_inputs_that_it_has_not_seen(layer):
    W, Wq, X, _ = layer
    calibration, unseen = X[:1500], X[1500:]
    factors = eora(W, Wq, 8, second_moment(calibration))
    ours = output_error(W, Wq + factors.B @ factors.A, unseen)
    assert ours < 0.6 * output_error(W, Wq + truncated(W - Wq, 8), unseen) < output_error(W, Wq, unseen)


def test_it_is_the_formula_in_eigenvectors(layer):
    W, Wq, X, _ = layer
    C = second_moment(X)
    values, Q = torch.linalg.eigh(C)
    U, S, Vh = torch.linalg.svd((W - Wq) @ Q * values.sqrt(), full_matrices=False)
    factors = eora(W, Wq, 8, C, ridge=1e-10, svd="exact")
    expected = (U[:, :8] * S[:8]) @ (Vh[:8] / values.sqrt()) @ Q.T
    assert relative(factors.B @ factors.A, expected) < 1e-5
    torch.testing.assert_close(factors.B.T @ factors.B, torch.diag(S[:8]), atol=1e-6 * S[0].item(), rtol=1e-6)


def test_no_other_correction_of_that_rank_does_better(layer):
    W, Wq, X, _ = layer
    factors = eora(W, Wq, 8, second_moment(X), ridge=1e-12, svd="exact")
    best = output_error(W, Wq + factors.B @ factors.A, X)
    assert best == pytest.approx((torch.linalg.svdvals((W - Wq) @ X.T)[8:] ** 2).sum().item() / (len(X) * 64), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for step in (1e-3, 1e-2, 1e-1):
        for _ in range(10):
            dB, dA = (
                torch.randn(part.shape, generator=generator, dtype=part.dtype) * step * part.norm(dim=0).mean()
                for part in (factors.B, factors.A)
            )
            assert output_error(W, Wq + (factors.B + dB) @ (factors.A + dA), X) > best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["matrix", "factor"])
def test_directions_that_no_input_has_divide_by_nothing(kind, dtype):
    W = weight(48, 64)
    X = inputs(12, 64, decay=0.2)
    F = (X.T / len(X) ** 0.5).to(dtype)
    moment = SecondMoment(factor=F) if kind == "factor" else SecondMoment(matrix=F @ F.T)
    Wq = three_levels(W)
    factors = eora(W.to(dtype), Wq.to(dtype), 12, moment)
    assert factors.A.isfinite().all()
    assert factors.A.norm() < 1e3 * (W - Wq).norm()
    # 12 directions carry all inputs, so rank 12 leaves nothing of the error on them.
    corrected = output_error(W, Wq + factors.B.double() @ factors.A.double(), X)
    assert corrected < 1e-6 * output_error(W, Wq, X)


def test_a_batch_is_corrected_like_each_of_its_members():
    W = torch.stack([weight(48, 64, seed=seed) for seed in range(3)])
    Wq, C = torch.stack([three_levels(w) for w in W]), second_moment(inputs(500, 64))
    batch = eora(W, Wq, 4, C)
    for index in range(3):
        alone = eora(W[index], Wq[index], 4, C)
        assert relative(batch.B[index] @ batch.A[index], alone.B @ alone.A) < 1e-8


def test_half_precision_is_computed_in_float32():
    W = weight(48, 64).bfloat16()
    factors = eora(W, three_levels(W.float()), 4, second_moment(inputs(500, 64)).float())
    assert factors.A.dtype == factors.B.dtype == torch.float32


def test_packed_bytes_instead_of_the_dequantised_matrix_are_refused():
    with pytest.raises(WeightError, match="dequantised"):
        eora(weight(48, 64), torch.zeros(48 * 32, 1, dtype=torch.uint8), 4, torch.eye(64))
