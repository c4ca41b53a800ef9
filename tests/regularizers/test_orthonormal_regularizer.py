"""SORSA's regulariser: known values, its closed-form gradient against autograd, and what is refused."""

from __future__ import annotations

import pytest
import torch

from llmreg.errors import UnsupportedError
from llmreg.regularizers import OrthonormalRegularizer
from llmreg.regularizers.orthonormal import condition_number


def orthonormal_rows(rank, width, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=dtype)).Q.T.contiguous()


def random_factors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 9, generator=generator, dtype=dtype), torch.randn(4, 6, generator=generator, dtype=dtype)]


def test_a_scaled_identity_has_the_known_value_and_gradient():
    A = 1.1 * torch.eye(4, dtype=torch.float64)
    assert float(OrthonormalRegularizer().loss([A])) == pytest.approx(0.42)
    torch.testing.assert_close(OrthonormalRegularizer().gradient(A, 1), 1.1 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.1])
def test_scaled_orthonormal_rows_deviate_by_the_known_amount(scale):
    deviation = float(OrthonormalRegularizer().loss([scale * orthonormal_rows(4, 9)]))
    assert deviation == pytest.approx(abs(scale**2 - 1) * 2, abs=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("squared", [False, True])
def test_the_closed_form_gradient_is_autograd_s(squared, reduction):
    regularizer = OrthonormalRegularizer(squared=squared, reduction=reduction)
    factors = [factor.requires_grad_() for factor in random_factors()]
    for targets in (None, [0.5 * torch.ones(4, 4, dtype=torch.float64), None]):
        expected = torch.autograd.grad(regularizer.loss(factors, targets), factors)
        for factor, gradient, target in zip(factors, expected, targets or [None, None], strict=True):
            found = regularizer.gradient(factor, len(factors), target=target)
            torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *given: regularizer.loss(given), factors)


def test_a_factor_of_columns_has_the_transposed_gradient():
    factor = random_factors()[0]
    regularizer = OrthonormalRegularizer()
    expected = regularizer.gradient(factor, 2).mT
    torch.testing.assert_close(regularizer.gradient(factor.mT, 2, rows=False), expected, atol=1e-12, rtol=1e-12)


def test_the_mean_is_the_paper_s_sum_over_the_number_of_factors():
    factors = random_factors()
    ratio = OrthonormalRegularizer(reduction="sum").loss(factors) / OrthonormalRegularizer().loss(factors)
    assert float(ratio) == pytest.approx(2)


def test_at_exact_orthonormality_value_and_gradient_are_zero_not_nan():
    A = torch.eye(3, 5, dtype=torch.float64, requires_grad=True)
    value = OrthonormalRegularizer().loss([A])
    value.backward()
    assert value == 0
    assert not A.grad.any()
    assert not OrthonormalRegularizer().gradient(A.detach(), 1).any()


def test_near_orthonormality_the_gradient_s_norm_stays_two():
    A = orthonormal_rows(4, 9) + 1e-9 * random_factors()[0]
    assert float(OrthonormalRegularizer().gradient(A, 1).norm()) == pytest.approx(2, rel=1e-6)


def test_half_precision_factors_are_measured_in_float32():
    A = orthonormal_rows(4, 64).to(torch.bfloat16)
    gradient = OrthonormalRegularizer().gradient(A, 1)
    assert gradient.dtype == torch.bfloat16
    exact = OrthonormalRegularizer().gradient(A.float(), 1)
    torch.testing.assert_close(gradient.float(), exact, atol=1e-2, rtol=1e-2)


def test_the_condition_number_is_the_worst_factor_s():
    assert condition_number([orthonormal_rows(4, 9)]) == pytest.approx(1)
    assert condition_number([orthonormal_rows(4, 9), torch.diag(torch.tensor([4.0, 2.0]))]) == pytest.approx(2)
    assert condition_number([torch.diag(torch.tensor([1.0, 0.0]))]) == float("inf")


@pytest.mark.parametrize(
    "settings", [{"weight": -1}, {"weight": "much"}, {"weight": True}, {"reduction": "max"}], ids=str
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UnsupportedError, match=next(iter(settings))):
        OrthonormalRegularizer(**settings)
