"""Quantities of the next-token distribution from hidden states and the head, without (tokens, vocabulary) memory.

Logits are `z = cap(scale (h W^T + b)) / T`, made in tiles of tokens by vocabulary, forward and again backward.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from .base import Head

__all__ = ["TokenStatistics", "teacher_kl", "token_statistics"]


class TokenStatistics(NamedTuple):
    """(n,) each, float32 (float64 for float64 inputs), with exact gradients; None where not asked for."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    max_log_prob: Tensor | None = None
    kept_log_mass: Tensor | None = None
    top_k_entropy: Tensor | None = None


def token_statistics(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None = None,
    *,
    outputs: Collection[str],
    kappa: float | None = None,
    tau: float | None = None,
    top_k: int | None = None,
) -> TokenStatistics:
    """See `TokenStatistics`."""
    raise NotImplementedError


def teacher_kl(hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, *, temperature: float) -> Tensor:
    """(n,) `KL(teacher || student)` at a temperature."""
    raise NotImplementedError
