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
    # `max` returns the first maximum, so a tie is broken in the same way on every device.
    largest = U.abs().max(dim=-2, keepdim=True).indices
    sign = torch.where(U.gather(-2, largest) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, Vh * sign.mT
