"""The difference form: what every additive adapter adds to the base layer's output.

    y = W x + s (B A - B0 A0) x = W x + s [(B - B0) A + B0 (A - A0)] x

The right-hand form is a sum of small differences: exactly zero while `A = A0`, `B = B0`, and accurate in half
precision, where `s (B A x - B0 A0 x)` loses a quarter of a 1 % update to cancellation. Both terms go through one
pair of products, with the concatenated factors

    down = [A ; A - A0]  (2r, in)          up = [B - B0 | B0]  (out, 2r)

which is also how the adapter is saved: a plain LoRA of rank 2r.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_difference", "concatenate", "split"]


def concatenate(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors `(r, in)`, `(out, r)` twice -> `down` `(2r, in)`, `up` `(out, 2r)`, in the factors' dtype.

    Half-precision differences are exact up to the one rounding of the result.
    """
    return torch.cat([A, A - A0], dim=0), torch.cat([B - B0, B0], dim=1)


def split(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of `concatenate`: `(A, B, A0, B0)`, within one rounding of the factors it was made of.

    Any rank-2r LoRA splits into factors that compute the same function.
    """
    rank = down.shape[0] // 2
    A, A_change = down[:rank], down[rank:]
    B_change, B0 = up[:, :rank], up[:, rank:]
    return A, B_change + B0, A - A_change, B0


def _without_autocast(device: torch.device) -> AbstractContextManager:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _AddDifference(torch.autograd.Function):
    """`result + scaling * (x down^T) up^T` with the exact gradient of `B A` in `A` and `B`.

    Autograd through the four factors would multiply by `A` and `A - A0` separately and form `dL/dA` twice; written
    out, the backward pass needs one product with `up` for both `dL/dA = s B^T g x^T` and `dL/dx`.
    Saves `x`, `x A^T` and the factors; nothing the size of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scaling: float
    ) -> Tensor:
        with _without_autocast(x.device):
            down, up = concatenate(A, B, A0, B0)
            hidden = x @ down.to(x.dtype).t()
            ctx.save_for_backward(x, hidden[:, : A.shape[0]], A, B, A0, B0)
            ctx.scaling = scaling
            up = up.to(x.dtype)
            if result.dtype == x.dtype:
                return torch.addmm(result, hidden, up.t(), alpha=scaling)
            return (result + scaling * (hidden @ up.t())).to(result.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, A, B, A0, B0 = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad[1:4]
        grad_x = grad_A = grad_B = None
        with _without_autocast(x.device):
            g = grad.to(x.dtype)
            if needs_x or needs_A:
                down, up = concatenate(A, B, A0, B0)
                g_up = (g @ up.to(x.dtype)).mul_(ctx.scaling)
                rank = A.shape[0]
                if needs_A:
                    g_B = g_up[:, :rank] + g_up[:, rank:]
                    grad_A = (g_B.t() @ x).to(A.dtype)
                if needs_x:
                    grad_x = g_up @ down.to(x.dtype)
            if needs_B:
                if torch.is_grad_enabled():  # a second derivative must see that `hidden` depends on `x` and `A`
                    hidden = x @ A.to(x.dtype).t()
                grad_B = (g.t() @ hidden).mul_(ctx.scaling).to(B.dtype)
        return grad, grad_x, grad_A, grad_B, None, None, None


def add_difference(result: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scaling: float) -> Tensor:
    """The base layer's `result` `(..., out)` plus the adapter's difference for the input `x` `(..., in)`.

    Computes in `x`'s dtype, or in autocast's where autocast is on; returns `result`'s dtype. `A0`, `B0` get no
    gradient. The gradients are those of `s B A x`: what training the factors beside the residual weight would give.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat = _AddDifference.apply(result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1]), A, B, A0, B0, scaling)
    return flat.view(result.shape)
