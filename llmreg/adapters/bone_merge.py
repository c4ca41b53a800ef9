"""Merging Bone adapters into a weight and out of it again, in fp32 at least and never in place.

All updates are relative to the base, so adapters merge in any order. With `S = sum of the bat blocks' action` and
`d = everything that does not depend on W`,

    W' = W (I + S) + d          W = (W' - d) (I + S)^-1

`S` acts on groups of `L` columns and is the same for `g` consecutive rows, `L` the least common multiple and `g` the
greatest common divisor of the adapters' block sizes: unmerging solves one `L x L` system a group of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightError
from ..weights import requantize
from .bone_function import bat_delta, shared_delta

__all__ = ["merged", "store", "unmerged"]

#: Elements of the systems that are solved at a time.
_SYSTEMS = 1 << 22


def merged(W: Tensor, blocks: list[Tensor]) -> Tensor:
    """`W'` `(out, in)` in `W`'s dtype for the blocks of some adapters: `(r, m)`, or `(out / r, r, r)` for bat."""
    result = W.clone(memory_format=torch.contiguous_format)
    for block in blocks:
        result += bat_delta(W, block) if block.dim() == 3 else shared_delta(block, *W.shape)
    return result


def unmerged(W: Tensor, blocks: list[Tensor], name: str = "") -> Tensor:
    """`W` from what `merged` gave, within rounding.

    Raises:
        WeightError: `I + S` is singular for some rows: merging has lost the base there.
    """
    result = W.clone(memory_format=torch.contiguous_format)
    bats = [block for block in blocks if block.dim() == 3]
    for block in blocks:
        if block.dim() == 3:
            r = block.shape[-1]
            result.view(-1, r, W.shape[1] // r, r).sub_(block.unsqueeze(2))
        else:
            result -= shared_delta(block, *W.shape)
    if not bats:
        return result
    sizes = [block.shape[-1] for block in bats]
    rows, columns = math.gcd(*sizes), math.lcm(*sizes)
    groups = result.view(-1, rows * W.shape[1] // columns, columns)
    step = max(1, _SYSTEMS // columns**2)
    for start in range(0, len(groups), step):
        systems = torch.eye(columns, dtype=W.dtype, device=W.device).repeat(min(step, len(groups) - start), 1, 1)
        for block in bats:
            _add_on_diagonal(systems, block, start, rows)
        part = groups[start : start + step]
        solved, info = torch.linalg.solve_ex(systems, part, left=False)
        if bool(info.any()) or not bool(solved.isfinite().all()):
            raise WeightError(
                f"Layer {name!r} cannot be unmerged: I + B is singular for some of its blocks, so merging lost the "
                "base weight; reload the base model, or merge with exact_unmerge=True, which keeps a copy."
            )
        part.copy_(solved)
    return result


def _add_on_diagonal(systems: Tensor, block: Tensor, start: int, rows: int) -> None:
    """Add the `B` that acts on each group of `rows` rows, repeated along the diagonal."""
    r = block.shape[-1]
    owner = torch.arange(start, start + len(systems), device=block.device) * rows // r
    for corner in range(0, systems.shape[-1], r):
        systems[:, corner : corner + r, corner : corner + r] += block[owner]


# -- the base layer ------------------------------------------------------------------------------------------------


def store(base: Any, W: Tensor, name: str) -> None:
    """Give a base layer the weight `W` `(out, in)`, stored as it stores its own.

    Raises:
        WeightError: values that its dtype cannot hold; the layer is then as it was.
    """
    parameter: Any = requantize(base, W, name=name)
    if parameter.dtype.is_floating_point and not hasattr(parameter, "quant_state"):
        if not bool(parameter.isfinite().all()):
            raise WeightError(
                f"Layer {name!r} cannot be merged: values of the merged weight do not fit {parameter.dtype}, or are "
                "not finite; lower the adapter's learning rate, or load the base in a wider dtype."
            )
        base.weight.data = parameter.data  # the parameter object stays: ties and optimizers may refer to it
        return
    base.weight = parameter
    if hasattr(parameter, "quant_state"):
        base.quant_state = parameter.quant_state
    elif getattr(base, "state", None) is not None:  # bitsandbytes took the old scales there at the first forward
        base.state.CB, base.state.SCB = parameter.data, parameter.SCB
