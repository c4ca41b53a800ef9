"""The spectral form: what a change `S` of singular values adds to the base layer's output.

    y = W x + s U diag(S) V^T x

Only `S (r,)` gets a gradient, `dL/dS_i = s sum (u_i . g) (v_i . x)`, so the backward pass needs `V^T x` but not `x`:
nothing the size of the activations is kept, where LoRA keeps `x`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .difference import without_autocast

__all__ = ["add_spectral"]


class _AddSpectral(torch.autograd.Function):
    """`result + scaling * (x Vh^T) (U diag(S))^T`, in the order in which a plain LoRA computes its saved factors."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, Vh: Tensor, U: Tensor, S: Tensor, scaling: float) -> Tensor:
        with without_autocast(x.device):
            hidden = x @ Vh.to(x.dtype).t()
            up = (U * S).to(x.dtype)
            ctx.save_for_backward(hidden, Vh, U, S)
            ctx.scaling = scaling
            if result.dtype == x.dtype:
                return torch.addmm(result, hidden, up.t(), alpha=scaling)
            return (result + scaling * (hidden @ up.t())).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, Vh, U, S = ctx.saved_tensors
        grad_x = grad_S = None
        if any(ctx.needs_input_grad[1:]):
            with without_autocast(hidden.device):
                g_U = (grad.to(hidden.dtype) @ U.to(hidden.dtype)).mul_(ctx.scaling)
                if ctx.needs_input_grad[4]:
                    grad_S = (g_U * hidden).sum(dim=0).to(S.dtype)
                if ctx.needs_input_grad[1]:
                    grad_x = (g_U * S.to(hidden.dtype)) @ Vh.to(hidden.dtype)
        return grad, grad_x, None, None, grad_S, None


def add_spectral(result: Tensor, x: Tensor, Vh: Tensor, U: Tensor, S: Tensor, scaling: float) -> Tensor:
    """The base layer's `result` `(..., out)` plus the adapter's term for the input `x` `(..., in)`.

    Computes in the wider dtype of `x` and `S`, as plain PEFT does with the saved factors, or in autocast's where it is
    on; returns `result`'s dtype.

    Args:
        Vh: `(r, in)`. U: `(out, r)`. S: `(r,)`. scaling: `s`.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    x = x.to(torch.get_autocast_dtype(x.device.type) if autocast else torch.promote_types(x.dtype, S.dtype))
    rows, inputs = result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
    return _AddSpectral.apply(rows, inputs, Vh, U, S, scaling).view(result.shape)
