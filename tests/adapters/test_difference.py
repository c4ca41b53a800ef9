"""The difference form `s [(B - B0) A + B0 (A - A0)] x`: zero at the start, exact gradients, accurate in bf16."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from llmreg.adapters.difference import add_difference, concatenate, split

OUT, IN, RANK, ROWS = 11, 13, 3, 5


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def factors(seed=0, dtype=torch.float64):
    """`A`, `B`, `A0`, `B0`."""
    return draw((RANK, IN), (OUT, RANK), (RANK, IN), (OUT, RANK), seed=seed, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_difference_is_exactly_zero_at_the_start(dtype):
    A, B, _, _ = factors(dtype=dtype)
    result, x = draw((ROWS, OUT), (ROWS, IN), seed=1, dtype=dtype)
    assert torch.equal(add_difference(result, x, A, B, A.clone(), B.clone(), 2.0), result)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_the_output_is_that_of_the_dense_formula(scaling):
    A, B, A0, B0 = factors()
    result, x = draw((2, ROWS, OUT), (2, ROWS, IN), seed=1)
    dense = result + scaling * x @ (B @ A - B0 @ A0).T
    torch.testing.assert_close(add_difference(result, x, A, B, A0, B0, scaling), dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("leading", [(), (ROWS,), (2, ROWS), (2, 1, ROWS), (0,)])
def test_any_leading_shape_is_kept(leading):
    result, x = draw((*leading, OUT), (*leading, IN))
    assert add_difference(result, x, *factors(seed=1), 1.0).shape == (*leading, OUT)


def test_gradients_of_input_result_and_factors_pass_gradcheck():
    result, x = (tensor.requires_grad_() for tensor in draw((ROWS, OUT), (ROWS, IN), seed=1))
    A, B, A0, B0 = factors()
    A.requires_grad_()
    B.requires_grad_()
    assert gradcheck(lambda *args: add_difference(*args, A0, B0, 0.7), (result, x, A, B), atol=1e-8, rtol=1e-6)


def test_gradients_are_those_of_training_beside_the_residual():
    A, B, A0, B0 = factors()
    W, x, grad = draw((OUT, IN), (ROWS, IN), (ROWS, OUT), seed=1)
    scaling = 0.5
    pairs = []
    for form in ("difference", "residual"):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        if form == "difference":
            out = add_difference(leaves[0] @ W.T, leaves[0], leaves[1], leaves[2], A0, B0, scaling)
        else:
            residual = W - scaling * B0 @ A0
            out = leaves[0] @ (residual + scaling * leaves[2] @ leaves[1]).T
        out.backward(grad)
        pairs.append([leaf.grad for leaf in leaves])
    for ours, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-10, rtol=1e-10)


def test_the_frozen_start_gets_no_gradient():
    A, B, A0, B0 = (factor.requires_grad_() for factor in factors())
    result, x = draw((ROWS, OUT), (ROWS, IN), seed=1)
    add_difference(result, x, A, B, A0, B0, 1.0).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert A0.grad is None
    assert B0.grad is None


@pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("result",), ("A", "B")])
def test_any_subset_may_require_gradients(wanted):
    A, B, A0, B0 = factors()
    result, x = draw((ROWS, OUT), (ROWS, IN), seed=1)
    leaves = {"result": result, "x": x, "A": A, "B": B}
    for name in wanted:
        leaves[name].requires_grad_()
    add_difference(result, x, A, B, A0, B0, 1.0).square().sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)


def test_second_derivatives_pass_gradgradcheck():
    result, x = (tensor.requires_grad_() for tensor in draw((ROWS, OUT), (ROWS, IN), seed=1))
    A, B, A0, B0 = factors()
    A.requires_grad_()
    B.requires_grad_()
    assert gradgradcheck(lambda *args: add_difference(*args, A0, B0, 0.7), (result, x, A, B), atol=1e-7, rtol=1e-5)


def test_in_bfloat16_the_update_survives_that_the_naive_concatenation_loses():
    """A 1 % update of rank-r factors: `[B|-B0][A;A0]` cancels it away, the difference form keeps it."""
    out, width, rank = 96, 128, 16
    A0, B0, dA, dB, x = draw((rank, width), (out, rank), (rank, width), (out, rank), (64, width))
    A0, B0 = A0.bfloat16(), B0.bfloat16()
    A, B = (A0 + 0.01 * dA).bfloat16(), (B0 + 0.01 * dB).bfloat16()
    x = x.bfloat16()
    exact = x.double() @ (B.double() @ A.double() - B0.double() @ A0.double()).T
    naive = (x @ torch.cat([A, A0]).T) @ torch.cat([B, -B0], dim=1).T
    ours = add_difference(torch.zeros(64, out, dtype=torch.bfloat16), x, A, B, A0, B0, 1.0)

    def error(value):
        return ((value.double() - exact).norm() / exact.norm()).item()

    assert error(ours) < 0.01
    assert error(naive) > 0.10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_split_undoes_concatenate_within_one_rounding(dtype):
    given = factors(dtype=dtype)
    for value, restored in zip(given, split(*concatenate(*given)), strict=True):
        torch.testing.assert_close(restored, value, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_split_of_any_plain_lora_computes_the_same_function():
    down, up = draw((2 * RANK, IN), (OUT, 2 * RANK))
    A, B, A0, B0 = split(down, up)
    torch.testing.assert_close(B @ A - B0 @ A0, up @ down, atol=1e-12, rtol=0)


def test_mixed_dtypes_keep_the_dtype_of_the_result():
    (result,) = draw((ROWS, OUT), dtype=torch.bfloat16)
    (x,) = draw((ROWS, IN), dtype=torch.float32)
    assert add_difference(result, x, *factors(dtype=torch.float32), 1.0).dtype == torch.bfloat16
