"""Matrices with a spectrum that the test chooses."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_with_spectrum(
    m: int, n: int, spectrum: Tensor, *, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """`U diag(spectrum) V^T` of shape `(*batch, m, n)` with random orthonormal `U`, `V`; made in float64."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(*batch, m, k, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(*batch, n, k, generator=generator, dtype=torch.float64))
    return ((U * spectrum[:k].to(torch.float64)) @ V.mT).to(dtype)


def power_law(k: int, exponent: float = 0.6) -> Tensor:
    return torch.arange(1, k + 1, dtype=torch.float64) ** -exponent


def orthonormality_error(Q: Tensor) -> float:
    """Largest entry of `|Q^T Q - I|` for columns `Q (..., m, k)`."""
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()
