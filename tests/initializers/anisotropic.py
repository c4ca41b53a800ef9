"""Inputs whose directions matter differently, and what the initialisers are compared with, dense and in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def inputs(count: int, width: int, *, decay: float = 1.2, seed: int = 0) -> Tensor:
    """`(count, width)` float64 with standard deviations `k^-decay` along random orthonormal directions."""
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    deviations = torch.arange(1, width + 1, dtype=torch.float64) ** -decay
    return (torch.randn(count, width, generator=generator, dtype=torch.float64) * deviations) @ directions.T


def second_moment(X: Tensor) -> Tensor:
    return X.T @ X / len(X)


def weight(out: int, width: int, *, seed: int = 0) -> Tensor:
    """`(out, width)` float64, Gaussian."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(out, width, generator=generator, dtype=torch.float64) / width**0.5


def damped(C: Tensor, damping: float = 0.01) -> Tensor:
    return C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def truncated(W: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()
