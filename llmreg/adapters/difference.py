"""The difference form: what an additive adapter with a decomposed start adds to the base layer's output.

    y = W x + s (P A - P0 A0) x = W x + s [(P - P0) A + P0 (A - A0)] x,      P = B   or   P = B diag(S)

The right-hand form is a sum of small differences: exactly zero while the factors are at their start, and accurate in
half precision, where `s (B A x - B0 A0 x)` loses a quarter of a 1 % update to cancellation. With `S` (SORSA) the left
difference is itself such a sum, `P - P0 = (B - B0) diag(S) + B0 diag(S - S0)`. Both terms go through one pair of
products, with the concatenated factors

    down = [A ; A - A0]  (2r, in)          up = [P - P0 | P0]  (out, 2r)

which is also how the adapter is saved: a plain LoRA of rank 2r. No `out x in` product is ever formed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_difference", "concatenate", "split", "without_autocast"]


def concatenate(
    A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, S: Tensor | None = None, S0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors `(r, in)`, `(out, r)` twice, perhaps `(r,)` twice -> `down` `(2r, in)`, `up` `(out, 2r)`, in their dtype.

    Half-precision differences are exact up to the one rounding of the result (with `S`: up to its four).
    """
    change, start = B - B0, B0
    if S is not None and S0 is not None:
        change, start = torch.addcmul(change * S, B0, S - S0), B0 * S0
    return torch.cat([A, A - A0], dim=0), torch.cat([change, start], dim=1)


def split(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of `concatenate` without `S`: `(A, B, A0, B0)`, within one rounding of the factors it was made of.

    Any rank-2r LoRA splits into factors that compute the same function.
    """
    rank = down.shape[0] // 2
    A, A_change = down[:rank], down[rank:]
    B_change, B0 = up[:, :rank], up[:, rank:]
    return A, B_change + B0, A - A_change, B0


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products run in their operands' dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _AddDifference(torch.autograd.Function):
    """`result + scaling * (x down^T) up^T` with the exact gradient of `P A` in its factors.

    Autograd through the factors would multiply by `A` and `A - A0` separately and form `dL/dA` twice; written out,
    the backward pass needs one product with `up` for both `dL/dA = s P^T g x^T` and `dL/dx`, and `dL/dP = s g A x`
    gives `dL/dB = dL/dP diag(S)` and `dL/dS_i = B_i . (dL/dP)_i`. Saves `x`, `x A^T` and the factors; nothing the size
    of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        S: Tensor | None,
        A0: Tensor,
        B0: Tensor,
        S0: Tensor | None,
        scaling: float,
    ) -> Tensor:
        with without_autocast(x.device):
            down, up = concatenate(A, B, A0, B0, S, S0)
            hidden = x @ down.to(x.dtype).t()
            # a copy, as a view would keep all of `hidden`
            ctx.save_for_backward(x, hidden[:, : A.shape[0]].contiguous(), A, B, S, A0, B0, S0)
            ctx.scaling = scaling
            up = up.to(x.dtype)
            if result.dtype == x.dtype:
                return torch.addmm(result, hidden, up.t(), alpha=scaling)
            return (result + scaling * (hidden @ up.t())).to(result.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, A, B, S, A0, B0, S0 = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_S = ctx.needs_input_grad[1:5]
        grad_x = grad_A = grad_B = grad_S = None
        with without_autocast(x.device):
            g = grad.to(x.dtype)
            if needs_x or needs_A:
                down, up = concatenate(A, B, A0, B0, S, S0)
                g_up = (g @ up.to(x.dtype)).mul_(ctx.scaling)
                rank = A.shape[0]
                if needs_A:
                    g_P = g_up[:, :rank] + g_up[:, rank:]
                    grad_A = (g_P.t() @ x).to(A.dtype)
                if needs_x:
                    grad_x = g_up @ down.to(x.dtype)
            if needs_B or needs_S:
                if torch.is_grad_enabled():  # a second derivative must see that `hidden` depends on `x` and `A`
                    hidden = x @ A.to(x.dtype).t()
                grad_P = (g.t() @ hidden).mul_(ctx.scaling)
                if S is None:
                    grad_B = grad_P.to(B.dtype)
                else:
                    grad_B = (grad_P * S.to(x.dtype)).to(B.dtype)
                    grad_S = (grad_P * B.to(x.dtype)).sum(dim=0).to(S.dtype)
        return grad, grad_x, grad_A, grad_B, grad_S, None, None, None, None


def add_difference(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    A0: Tensor,
    B0: Tensor,
    scaling: float,
    S: Tensor | None = None,
    S0: Tensor | None = None,
) -> Tensor:
    """The base layer's `result` `(..., out)` plus the adapter's difference for the input `x` `(..., in)`.

    Computes in `x`'s dtype, or in autocast's where autocast is on; returns `result`'s dtype. `A0`, `B0`, `S0` get no
    gradient. The gradients are those of `s P A x`: what training the factors beside the residual weight would give.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows, inputs = result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
    return _AddDifference.apply(rows, inputs, A, B, S, A0, B0, S0, scaling).view(result.shape)
