"""What the variants of Bone add to a layer's output, as functions of tensors (arXiv 2409.15371).

    bone   y += z D                       z = sum of the input's groups of r columns, `fold(x)`
    mini   y[:, k m : (k + 1) m] += z D   for every k
    bat    y  = x (W + dW)^T              dW_a = W_a B_a + B_a for every r x r block of the a-th row of blocks

`bat` needs the full weight. Nothing its size is kept for backward: `W` is asked for again (`read`, which dequantises
where it must), and `dB_a = sum_b (W_ab^T G_ab + G_ab)` with `G = g^T x` is formed for a few rows of blocks at a time.
A step costs three products with the weight's shape, of which plain LoRA needs two, and three thin ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["add_bat", "add_shared", "bat_delta", "bat_linear", "fold", "shared_delta"]

#: `W` (out, in) of a base layer in a dtype; called once in forward and once in backward.
Read = Callable[[torch.dtype], Tensor]
#: Elements of the weight that backward works on at a time: 4 MiB in float32, which stay in a CPU's cache.
_CHUNK = 1 << 20
#: On a GPU larger products pay; and in half precision every further piece of `dL/dx` is one more rounding.
_LARGE_CHUNK = 1 << 24


def fold(x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """`z[i] = sum of x[j] over j mod r = i`: `(..., in)` -> `(..., r)` in `dtype`.

    Where r does not divide `in` the last group is short, as if `x` were padded with zeros.
    """
    whole = x.shape[-1] // r * r
    z = x[..., :whole].unflatten(-1, (-1, r)).sum(-2, dtype=dtype)
    if whole == x.shape[-1]:
        return z
    tail = x[..., whole:].to(dtype)
    return z + F.pad(tail, (0, r - tail.shape[-1]))


def add_shared(result: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """`result (..., out)` plus what `bone` or `mini` adds; `D` `(r, m)` with `m` dividing `out`.

    `bone` is the case `m = out`. The columns of `D` are repeated in the output, never in memory.
    """
    z = fold(x, D.shape[0], torch.promote_types(x.dtype, D.dtype))
    if D.shape[1] == result.shape[-1]:
        if z.dtype == D.dtype == result.dtype and not torch.is_autocast_enabled(x.device.type):
            return torch.addmm(_rows(result), _rows(z), D).view(result.shape)
        return result + (z @ D.to(z.dtype)).to(result.dtype)
    added = (z @ D.to(z.dtype)).to(result.dtype)
    return (result.unflatten(-1, (-1, D.shape[1])) + added.unsqueeze(-2)).flatten(-2)


def shared_delta(D: Tensor, out_features: int, in_features: int) -> Tensor:
    """`dW (out, in)` of `bone` or `mini`: `dW[o, j] = D[j mod r, o mod m]`.

    Example:
        >>> shared_delta(torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]), 3, 4)[1]
        tensor([ 1., 11.,  1., 11.])
    """
    r, m = D.shape
    return D.t().repeat(out_features // m, -(-in_features // r))[:, :in_features]


def bat_delta(W: Tensor, B: Tensor) -> Tensor:
    """`dW` of `bat` for `W` `(rows, in)`, a whole number of rows of blocks, and their `B` `(rows / r, r, r)`."""
    n, r, _ = B.shape
    delta = torch.bmm(W.reshape(n, -1, r), B)
    delta.view(n, r, -1, r).add_(B.unsqueeze(2))
    return delta.view(W.shape)


def _transformed(W: Tensor, B: Tensor) -> Tensor:
    """`W + dW`. At `B = 0` it is `W` to the last bit, also where products are rounded to TF32."""
    n, r, _ = B.shape
    result = torch.add(W.reshape(n, r, -1, r), B.unsqueeze(2)).view(n, -1, r)
    return result.baddbmm_(W.reshape(n, -1, r), B).view(W.shape)


def bat_linear(x: Tensor, B: Tensor, bias: Tensor | None, read: Read) -> Tensor:
    """`x (W + dW)^T + bias`: base layer and `bat` together. `x` `(..., in)`, `W` and `bias` of one dtype."""
    return _BatLinear.apply(x, B, bias, read)


def add_bat(result: Tensor, x: Tensor, B: Tensor, read: Read) -> Tensor:
    """`result + x dW^T`, for a base layer that computes in its own way, or a dropped `x`.

    In half precision `dW` is rounded by itself, so that small updates are not lost beside `W`.
    """
    return _AddBat.apply(result, x, B, read)


class _BatLinear(torch.autograd.Function):
    """See `bat_linear`. Saves `x` and `B`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, bias: Tensor | None, read: Read) -> Tensor:
        ctx.save_for_backward(x, B)
        ctx.read = read
        return F.linear(x, _transformed(read(x.dtype), B.to(x.dtype)), bias)  # one call, as in the base layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, B = ctx.saved_tensors
        needs_x, needs_B, needs_bias = ctx.needs_input_grad[:3]
        grad_x, grad_B = _gradients(grad, x, B, ctx.read, _transformed if needs_x else None, needs_B)
        return grad_x, grad_B, _rows(grad).sum(0) if needs_bias else None, None


class _AddBat(torch.autograd.Function):
    """See `add_bat`. Saves `x` and `B`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, B: Tensor, read: Read) -> Tensor:
        ctx.save_for_backward(x, B)
        ctx.read = read
        with torch.autocast(x.device.type, enabled=False):
            return result + F.linear(x, bat_delta(read(x.dtype), B.to(x.dtype))).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, B = ctx.saved_tensors
        needs_result, needs_x, needs_B = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            g = grad.to(x.dtype)
            grad_x, grad_B = _gradients(g, x, B, ctx.read, bat_delta if needs_x else None, needs_B)
        return grad if needs_result else None, grad_x, grad_B, None


def _gradients(
    grad: Tensor, x: Tensor, B: Tensor, read: Read, weight: Callable[[Tensor, Tensor], Tensor] | None, needs_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`dL/dx` through `weight(W, B)` (None: not wanted) and `dL/dB`, a few rows of blocks at a time."""
    if weight is None and not needs_B:
        return None, None
    W, r = read(x.dtype), B.shape[-1]
    g, flat = _rows(grad), _rows(x)
    grad_x = torch.zeros_like(flat, memory_format=torch.contiguous_format) if weight is not None else None
    grad_B = torch.empty_like(B, dtype=x.dtype, memory_format=torch.contiguous_format) if needs_B else None
    for start, stop in _chunks(W, r):
        rows, g_rows = W[start * r : stop * r], g[:, start * r : stop * r]
        if grad_x is not None and weight is not None:
            grad_x.addmm_(g_rows, weight(rows, B[start:stop].to(x.dtype)))
        if grad_B is not None:
            G = (g_rows.t() @ flat).view(stop - start, -1, r)  # (blocks, r in / r, r)
            sums = G.view(stop - start, r, -1, r).sum(2)
            grad_B[start:stop] = torch.baddbmm(sums, rows.reshape(G.shape).transpose(1, 2), G)
    return (
        None if grad_x is None else grad_x.view(x.shape),
        None if grad_B is None else grad_B.to(B.dtype),
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _chunks(W: Tensor, r: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of blocks of about a chunk's elements."""
    small = W.device.type == "cpu" and W.dtype.itemsize >= 4
    blocks, step = W.shape[0] // r, max(1, (_CHUNK if small else _LARGE_CHUNK) // (W.shape[1] * r))
    for start in range(0, blocks, step):
        yield start, min(blocks, start + step)
