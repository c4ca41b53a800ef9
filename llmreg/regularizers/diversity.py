"""BA-LoRA's diversity regulariser (arXiv 2408.04556): outputs do not collapse onto a few answers.

    nlu:  L_DR = (1 / D) sum_{i != j} C_ij^2,  C = Zc^T Zc / (N - 1),  Zc (N, D) the logits without their column means
    nlg:  L_DR = - mean H( softmax of the K largest logits )      over scored tokens; K = 20, from -ln K to 0

For a classifier it is the redundancy between classes, for a language model minus an entropy, which minimising raises.
The first generation ("v1") takes the entropy of the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .balora import BaLoraTerm, at_least_float32, check_count, nothing
from .base import Context
from .vocabulary import token_statistics

__all__ = ["DiversityRegularizer"]


@dataclass(frozen=True)
class DiversityRegularizer(BaLoraTerm):
    """Minus the entropy of next tokens, or how classes vary together.

    Args:
        weight, schedule, variant, task: as in `BaLoraTerm`; paper: 0.005 (nlg), 0.03 (nlu), two_phase.
        top_k: K, of "nlg" and "iclr".

    Raises:
        RecipeError: `top_k` is no integer of at least 2.
    """

    top_k: int = 20

    name: ClassVar[str] = "diversity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "top_k", 2)

    @property
    def reduction(self) -> Literal["tokens", "batch"]:
        return "batch" if self.task == "nlu" else "tokens"

    def loss(self, context: Context) -> Tensor:
        """`L_DR`, a scalar with gradients; 0 for fewer than two rows of a classifier, or where no token is scored."""
        if self.is_nlu(context):
            (logits,) = self.of(context, "logits")
            return _covariances(at_least_float32(logits)) if len(logits) > 1 else nothing(logits)
        hidden, head = self.of(context, "hidden", "head")
        if self.variant == "v1":
            entropy = token_statistics(hidden, head, outputs=("entropy",)).entropy
        else:
            top_k = min(self.top_k, head.vocabulary)
            entropy = token_statistics(hidden, head, outputs=("top_k_entropy",), top_k=top_k).top_k_entropy
        assert entropy is not None
        return -entropy.sum() / max(1, len(entropy))


def _covariances(Z: Tensor) -> Tensor:
    centred = Z - Z.mean(0)
    C = centred.mT @ centred / (len(Z) - 1)
    return (C - C.diagonal().diag()).square().sum() / len(C)
