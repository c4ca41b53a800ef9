"""What is asked of a next-token distribution, and its gradient with respect to the logits.

With `p = softmax(z)`, of each token:

    log_probs         log p_label                         gradient with respect to z    e_label - p
    max_log_prob      log max p                                                         e_argmax - p
    entropy           H = -sum p log p                                                  -p (log p + H)
    kept_log_mass     log Z,  Z = sum_K p                                               p / Z on K, minus p
    top_k_entropy     entropy of softmax over the k largest z                           the same, of those alone

`K` are the tokens that a filter keeps: `p > kappa max p` (min-p) or `p > tau`, a constant for the gradient. With
`q = p / Z` on `K`, `-log Z = KL(q || p)`, whose gradient is `p - q`: the low-probability regulariser on-policy (arXiv
2510.03222, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Asked", "Distribution", "TokenStatistics"]


class TokenStatistics(NamedTuple):
    """(n,) each, float32 (float64 for float64 inputs), with exact gradients; None where not asked for."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    max_log_prob: Tensor | None = None
    kept_log_mass: Tensor | None = None
    top_k_entropy: Tensor | None = None


@dataclass(frozen=True)
class Asked:
    """Which outputs, by name, and their settings."""

    outputs: tuple[str, ...]
    kappa: float | None
    tau: float | None
    top_k: int | None


class Distribution:
    """The distributions of a few tokens, from their logits `z` (tokens, vocabulary)."""

    def __init__(self, z: Tensor, labels: Tensor | None, asked: Asked) -> None:
        self.z, self.labels, self.asked = z, labels, asked

    @cached_property
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.z, 1)

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def log_probs(self) -> Tensor:
        assert self.labels is not None
        found = self.log_p.gather(1, self.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        return torch.where(self.labels >= 0, found, torch.zeros_like(found))

    @cached_property
    def max_log_prob(self) -> Tensor:
        return self.log_p.amax(1)

    @cached_property
    def entropy(self) -> Tensor:
        return -torch.linalg.vecdot(self.p, self.log_p)

    @cached_property
    def kept(self) -> Tensor:
        """`p` on the tokens that the filter keeps, else 0."""
        if self.asked.kappa is not None:
            threshold = self.max_log_prob + math.log(self.asked.kappa)
        else:
            assert self.asked.tau is not None
            threshold = torch.full_like(self.max_log_prob, math.log(self.asked.tau))
        below_max = torch.nextafter(self.max_log_prob, torch.full_like(threshold, -math.inf))
        threshold = torch.minimum(threshold, below_max).unsqueeze(1)
        # A mask in floating point: on a CPU `torch.where` with a Boolean one takes twenty times as long as a product.
        return torch.gt(self.log_p, threshold, out=torch.empty_like(self.log_p)).mul_(self.p)

    @cached_property
    def dropped(self) -> Tensor:
        return self.p - self.kept

    @cached_property
    def dropped_by_kept(self) -> Tensor:
        """`(1 - Z) / Z`, from a sum of what is dropped, which may be far below 1's rounding."""
        return self.dropped.sum(1) / self.kept.sum(1)

    @cached_property
    def kept_log_mass(self) -> Tensor:
        return -torch.log1p(self.dropped_by_kept)

    @cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the softmax over the k largest logits, and which those are."""
        assert self.asked.top_k is not None
        values, index = self.z.topk(self.asked.top_k, dim=1, sorted=False)
        return torch.log_softmax(values, 1), index

    @cached_property
    def top_k_entropy(self) -> Tensor:
        log_q = self.top[0]
        return -torch.linalg.vecdot(log_q.exp(), log_q)

    def top_k_gradient(self, incoming: Tensor) -> Tensor:
        """(tokens, k): of `sum incoming top_k_entropy`, with respect to the k largest logits."""
        log_q = self.top[0]
        return -incoming.unsqueeze(1) * log_q.exp() * (log_q + self.top_k_entropy.unsqueeze(1))

    def gradient(self, incoming: Mapping[str, Tensor]) -> Tensor:
        """(tokens, vocabulary): of `sum_outputs sum_tokens incoming output`, with respect to `z`."""
        given = {name: one.unsqueeze(1) for name, one in incoming.items()}
        factor: Tensor | float = 0.0  # the gradient is `p factor`, what the filter adds, and something at a few tokens
        points = []
        if "log_probs" in given:
            assert self.labels is not None
            label = self.labels.unsqueeze(1)
            push = torch.where(label >= 0, given["log_probs"], torch.zeros_like(given["log_probs"]))
            factor = factor - push
            points.append((label.clamp(min=0), push))
        if "max_log_prob" in given:
            factor = factor - given["max_log_prob"]
            points.append((self.z.argmax(1, keepdim=True), given["max_log_prob"]))
        if "entropy" in given:
            factor = factor - (self.log_p + self.entropy.unsqueeze(1)) * given["entropy"]
        if "top_k_entropy" in given:
            points.append((self.top[1], self.top_k_gradient(incoming["top_k_entropy"])))
        gradient = self.p * factor
        if "kept_log_mass" in given:
            push = given["kept_log_mass"]
            gradient.addcmul_(self.kept, push * self.dropped_by_kept.unsqueeze(1)).addcmul_(
                self.dropped, push, value=-1
            )
        for index, values in points:  # no index stands twice in a row, so this adds, and in one order on a GPU too
            gradient.scatter_(1, index, gradient.gather(1, index) + values)
        return gradient
