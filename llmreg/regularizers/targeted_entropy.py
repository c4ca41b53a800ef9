"""Targeted entropy regularisation: the mean token entropy of a policy is held at a target, from both sides.

    R = | H - H* |,    H = mean over scored tokens of the entropy of pi, in nats;    weight 0.001, H* = 0.55

An entropy bonus pushes one way only: it answers collapse, and not the drift into mixed languages that too much entropy
brings. The gradient is `sign(H - H*) dH`, 0 at the target itself. The authors drop the term after their first stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import RecipeError
from .base import Context, Need, check_weight
from .vocabulary import token_statistics

__all__ = ["ENTROPY", "TargetedEntropyRegularizer"]

#: Key of `Context.extra`: (n,) entropies with gradients, where the trainer has them anyway (TRL's fused head does).
ENTROPY = "entropy"


@dataclass(frozen=True)
class TargetedEntropyRegularizer:
    """Distance of the mean token entropy from a target.

    The mean is over one micro-batch: with accumulation the term is the mean of the micro-batches' distances.

    Args:
        target: H*, nats. weight: of the term. schedule: of the weight, one of `SCHEDULES`.

    Raises:
        RecipeError: a weight or target that is no number >= 0, or an unknown schedule.
    """

    target: float = 0.55
    weight: float = 0.001
    schedule: str = "constant"

    name = "targeted_entropy"
    needs: ClassVar[frozenset[Need]] = frozenset({"hidden"})
    reduction = "batch"

    def __post_init__(self) -> None:
        check_weight(self)
        target = self.target
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target < math.inf:
            raise RecipeError(f"{self.name}: target must be an entropy in nats, a number >= 0, got {target!r}.")

    def loss(self, context: Context) -> Tensor:
        """`R`, a scalar with gradients; 0 without scored tokens. Logs the mean as `regularizer/mean_entropy`."""
        entropy = context.extra.get(ENTROPY)
        if entropy is None:
            assert context.hidden is not None
            assert context.head is not None
            entropy = token_statistics(context.hidden, context.head, outputs=("entropy",)).entropy
            assert entropy is not None
        mean = entropy.sum() / max(entropy.numel(), 1)
        context.log["regularizer/mean_entropy"] = mean.detach()
        return (mean - self.target).abs() if entropy.numel() else mean
