"""PEFT tuners' own auxiliary losses, which TRL's trainers drop, as a regulariser.

AdaLoRA adds its orthogonality term to `outputs.loss`, and TRL takes the loss from `outputs.log_probs`; KaSA and
MonteCLoRA leave theirs to the user's training loop. Each has its own coefficients in its config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..regularizers.base import Context, Need, check_weight

__all__ = ["TunerRegularizer"]


@dataclass(frozen=True)
class TunerRegularizer:
    """The auxiliary losses of the active adapters, as PEFT computes them: AdaLoRA, KaSA, MonteCLoRA.

    Args:
        weight: on top of the coefficients in the adapters' configs.

    Raises:
        RecipeError: a weight that is no number >= 0.
        UnsupportedError: at the first step, no adapter has such a loss, or the trainer takes the model's own loss, to
            which AdaLoRA has added it.
    """

    weight: float = 1.0
    schedule: str = "constant"

    name: ClassVar[str] = "tuner"
    needs: ClassVar[frozenset[Need]] = frozenset({"model"})
    reduction: ClassVar[Literal["tokens", "batch"]] = "batch"

    def __post_init__(self) -> None:
        check_weight(self)

    def loss(self, context: Context) -> Tensor:
        """The sum of what the adapters ask for, a scalar."""
        tuner = getattr(context.model, "base_model", None)
        if context.loss_from == "loss" and _adalora(tuner):
            raise UnsupportedError(
                "AdaLoRA adds its term to the model's own loss, which this trainer takes (TRL's do not), so the tuner "
                "regulariser would add it again; leave it out."
            )
        terms = [term for compute in _LOSSES if isinstance(term := compute(tuner), Tensor)]
        if not terms:
            raise UnsupportedError(
                "No active adapter has an auxiliary loss; the tuner regulariser is for AdaLoraConfig, and LoraConfig "
                "with kasa_config or monteclora_config."
            )
        return torch.stack([term.reshape(()) for term in terms]).sum()


def _adalora(tuner: Any) -> Tensor | float:
    """Its orthogonality term: the mean of `||A A^T - I||_F` and `||B^T B - I||_F` (arXiv 2303.10512, equation 4)."""
    name = getattr(tuner, "trainable_adapter_name", None)
    weight = getattr(tuner.peft_config.get(name), "orth_reg_weight", 0) if name else 0
    if not weight:
        return 0.0
    deviations = []
    for key, parameter in tuner.model.named_parameters():
        if name in key.split(".") and parameter.requires_grad and ("lora_A" in key or "lora_B" in key):
            gram = parameter @ parameter.T if "lora_A" in key else parameter.T @ parameter
            deviations.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype).to(gram.device)))
    return weight * torch.stack(deviations).mean() if deviations else 0.0


def _of_lora(method: str) -> Callable[[Any], Tensor | float]:
    def compute(tuner: Any) -> Tensor | float:
        return getattr(tuner, method)() if hasattr(tuner, method) else 0.0

    return compute


_LOSSES = (_adalora, _of_lora("_get_kasa_loss"), _of_lora("_get_monteclora_loss"))
