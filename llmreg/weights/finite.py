"""NaN and Inf in a base weight, found in one pass without a temporary the size of the weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from llmreg.errors import WeightError

__all__ = ["all_finite", "check_finite"]

_CHUNK = 1 << 20  # elements


def check_finite(W: torch.Tensor, name: str) -> None:
    """Raise `WeightError` naming the layer and its NaN/Inf counts; silent for finite `W` of any shape.

    One sum over `W`; counting happens only once something is wrong.
    """
    if all_finite(W):
        return
    nan = sum(int(chunk.isnan().sum()) for chunk in _chunks(W))
    inf = sum(int(chunk.isinf().sum()) for chunk in _chunks(W))
    if nan or inf:
        raise WeightError(
            f"layer {name!r}: its weight holds {nan} NaN and {inf} infinite of {W.numel()} values; "
            "reload the checkpoint or exclude this layer from target_modules"
        )


def all_finite(W: torch.Tensor) -> bool:
    """Whether the sum of `W` is finite: a sum passes NaN and Inf on.

    False also where the sum itself overflows, so callers count before they complain. Summed in chunks
    because torch copies the whole tensor to sum it in another dtype.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    sums = [chunk.sum(dtype=wide) for chunk in _chunks(W)]
    return not sums or math.isfinite(torch.stack(sums).sum(dtype=torch.float64).item())


def _chunks(W: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pieces of about a million elements: views, so that a transposed weight is not copied either."""
    rows = W if W.dim() > 1 else W.reshape(1, -1) if W.dim() == 0 else W.unsqueeze(1)
    yield from rows.split(max(1, _CHUNK // max(1, math.prod(rows.shape[1:]))))
