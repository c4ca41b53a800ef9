"""What every initialiser returns: the starting point of an adapter for one weight, or a batch of equal shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Factors"]


@dataclass(frozen=True)
class Factors:
    """Starting factors of a low-rank adapter.

    Attributes:
        A: `(..., r, in)`, fp32 (fp64 for an fp64 weight).
        B: `(..., out, r)`, same dtype.
        singular_values: `(..., r)`, descending, of the matrix that was decomposed.
    """

    A: Tensor
    B: Tensor
    singular_values: Tensor
