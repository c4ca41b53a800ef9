"""A deterministic sign for every singular pair.

`(u, v)` and `(-u, -v)` are equally good singular pairs; LAPACK, cuSOLVER and a sketch choose differently.
The rule here: the entry of largest magnitude of each left vector is positive, the first such entry on a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fix_signs"]


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs of singular vectors so that the largest-magnitude entry of each left vector is positive.

    Args:
        U: left vectors in columns, `(..., m, r)`.
        Vh: right vectors in rows, `(..., r, n)`, same dtype and device.

    Returns:
        New tensors `(U, Vh)`; the product `U diag(S) Vh` is unchanged for every `S`.
    """
    magnitude = U.abs()
    # argmax leaves the choice among equal entries to the device, so the first one is taken explicitly.
    is_largest = magnitude == magnitude.amax(dim=-2, keepdim=True)
    row = torch.arange(U.shape[-2], device=U.device).unsqueeze(-1)
    first = torch.where(is_largest, row, U.shape[-2] - 1).amin(dim=-2, keepdim=True)
    sign = torch.where(U.gather(-2, first) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, Vh * sign.mT
