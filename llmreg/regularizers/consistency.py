"""BA-LoRA's consistency regulariser (arXiv 2408.04556): the student's outputs stay near the pretrained model's.

    L_CR = T^2 mean KL( softmax(Z_P / T) || softmax(Z / T) )      over scored tokens, or over a classifier's rows

The first generation ("v1") takes `|| Z / |Z| - Z_P / |Z_P| ||^2`, averaged over entries, for a classifier, and for a
language model the KL at T = 1 summed over all positions, prompt and padding included, over the number of sequences.
Here "v1" sums over scored positions alone: what padding adds depends on how a batch was put together, and what the
student says inside a prompt is not what is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RecipeError
from .balora import BaLoraTerm, at_least_float32
from .base import Context, Need
from .vocabulary import teacher_kl, token_statistics

__all__ = ["ConsistencyRegularizer"]

#: The least share of the weight that an adaptive one keeps (the authors' `lambda1_min`).
_LEAST = 0.1


@dataclass(frozen=True)
class ConsistencyRegularizer(BaLoraTerm):
    """How far the student's next-token (or class) distributions are from those of the model without its adapters.

    Args:
        weight, schedule, variant, task: as in `BaLoraTerm`; paper: 0.025 (nlg), 0.15 (nlu), cosine.
        temperature: T of "iclr".
        adaptive: scale the weight by how sure the teacher is, `0.1 + 0.9 (1 - H / ln V)` with its mean entropy `H`
            over the batch, instead of the cosine (authors' code). Logs `regularizer/consistency_confidence`.

    Raises:
        RecipeError: a temperature that is not above 0, or `adaptive` with "v1".

    Example:
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> float(ConsistencyRegularizer(task="nlu").loss(Context(logits=same, teacher_logits=same)))
        0.0
    """

    temperature: float = 2.0
    adaptive: bool = False

    name: ClassVar[str] = "consistency"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf):
            raise RecipeError(f"consistency: temperature must be a number above 0, got {self.temperature!r}.")
        if self.adaptive and self.variant == "v1":
            raise RecipeError('consistency: adaptive belongs to variant "iclr"; leave it out with "v1".')

    def _paper(self) -> dict[str, Any]:
        return {**super()._paper(), **({"schedule": "constant"} if self.adaptive else {})}

    @property
    def needs(self) -> frozenset[Need]:
        """ "v1" divides by the number of sequences."""
        needs: set[Need] = {"teacher", "rows"} if self.variant == "v1" and self.task != "nlu" else {"teacher"}
        return super().needs | needs

    @property
    def reduction(self) -> Literal["tokens", "batch"]:
        """A mean over tokens, except where a batch's confidence or its number of sequences is a factor."""
        per_token = self.task != "nlu" and self.variant == "iclr" and not self.adaptive
        return "tokens" if per_token else "batch"

    def loss(self, context: Context) -> Tensor:
        """`L_CR`, a scalar with gradients to the student; 0 where no token is scored."""
        if self.is_nlu(context):
            Z, teacher = map(at_least_float32, self.of(context, "logits", "teacher_logits"))
            return self._of_logits(Z, teacher.detach(), context)
        hidden, head, teacher_hidden = self.of(context, "hidden", "head", "teacher_hidden")
        teacher_head = context.teacher_head or head
        if self.variant == "v1":
            (rows,) = self.of(context, "rows")
            divergence = teacher_kl(hidden, head, teacher_hidden, teacher_head, temperature=1.0)
            return divergence.sum() / max(1, len(rows.unique()))
        divergence = teacher_kl(hidden, head, teacher_hidden, teacher_head, temperature=self.temperature)
        value = self.temperature**2 * divergence.sum() / max(1, len(divergence))
        if not self.adaptive:
            return value
        with torch.no_grad():
            entropy = token_statistics(teacher_hidden, teacher_head, outputs=("entropy",)).entropy
        assert entropy is not None
        return value * _share(entropy, teacher_head.vocabulary, context)

    def _of_logits(self, Z: Tensor, teacher: Tensor, context: Context) -> Tensor:
        if self.variant == "v1":
            return F.mse_loss(F.normalize(Z, dim=-1), F.normalize(teacher, dim=-1))
        T = self.temperature
        log_p, log_q = (teacher / T).log_softmax(-1), (Z / T).log_softmax(-1)
        value = T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        if not self.adaptive:
            return value
        entropy = torch.special.entr(teacher.softmax(-1)).sum(-1)
        return value * _share(entropy, teacher.shape[-1], context)


def _share(entropy: Tensor, outcomes: int, context: Context) -> Tensor:
    """The share of the weight that a teacher of this entropy (n,) leaves."""
    if not len(entropy):
        return entropy.new_ones(())
    confidence = 1 - entropy.mean() / math.log(outcomes)
    context.log["regularizer/consistency_confidence"] = confidence.detach()
    return _LEAST + (1 - _LEAST) * confidence
