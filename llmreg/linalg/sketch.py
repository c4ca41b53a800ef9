"""Gaussian test matrices that never touch the global random state.

They are drawn on the CPU, once for a whole batch, and then moved and cast: one seed gives the same sketch
on every device, in every dtype, and for a matrix alone or inside a batch of equal shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gaussian_sketch", "make_generator"]


def make_generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, seeded with `seed` (any Python integer; taken modulo 2^63)."""
    return torch.Generator(device="cpu").manual_seed(int(seed) % (1 << 63))


def gaussian_sketch(
    rows: int,
    columns: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A `(rows, columns)` matrix of independent standard normals (Halko et al. 2011, section 4.1).

    Args:
        generator: a CPU generator (`make_generator`); it advances by `rows * columns` float32 draws.
        dtype, device: of the result. The draws themselves are always float32 on the CPU.
    """
    draws = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    return draws.to(device=device, dtype=dtype)
