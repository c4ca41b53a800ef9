"""LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1): what QPiSSA's errors are compared with. PEFT's needs CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def loftq(
    W: Tensor, rank: int, quantize: Callable[[Tensor], tuple[object, Tensor]], *, iterations: int
) -> list[Tensor]:
    """`W - (Q_t + B_t A_t)` of every iterate: `Q_t = q(W - B_{t-1} A_{t-1})`, `B_t A_t` the best for `W - Q_t`."""
    product = torch.zeros_like(W)
    errors = []
    for _ in range(iterations):
        _, dequantized = quantize(W - product)
        U, S, Vh = torch.linalg.svd(W - dequantized, full_matrices=False)
        product = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        errors.append(W - dequantized - product)
    return errors
