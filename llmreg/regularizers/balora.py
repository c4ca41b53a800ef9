"""What the three terms of BA-LoRA share (arXiv 2408.04556): two tasks, two generations of formulas, and weights.

    L = L_task + l1(t) L_CR + l2(t) L_DR + l3(t) L_SVDR

of logits `Z` of the student and `Z_P` of the pretrained model: `consistency.py`, `diversity.py`, `singular_values.py`.
"nlu" is classification, one row of logits for each text. "nlg" is generation, one row for each scored token, and those
rows are never formed: hidden states and the head stand for them. "iclr" is the authors' later code, "v1" their first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import RecipeError, UnsupportedError
from .base import Context, Need, check_weight

__all__ = ["PAPER", "BaLoraTerm", "Task", "Variant"]

Task = Literal["nlg", "nlu"]
Variant = Literal["iclr", "v1"]

#: The weights of the three terms, by generation and task; the first generation has one set.
PAPER: dict[tuple[Variant, Task], dict[str, float]] = {
    ("iclr", "nlg"): {"consistency": 0.025, "diversity": 0.005, "singular_values": 0.005},
    ("iclr", "nlu"): {"consistency": 0.15, "diversity": 0.03, "singular_values": 0.03},
    ("v1", "nlg"): {"consistency": 1e-4, "diversity": 3e-4, "singular_values": 1e-4},
    ("v1", "nlu"): {"consistency": 1e-4, "diversity": 3e-4, "singular_values": 1e-4},
}
#: Of the later code; the first keeps its weights constant.
_SCHEDULES = {"consistency": "cosine", "diversity": "two_phase", "singular_values": "two_phase"}


@dataclass(frozen=True)
class BaLoraTerm:
    """Base of the three terms.

    Args:
        weight: coefficient at full strength; None: the paper's for `variant` and `task`.
        schedule: one of `SCHEDULES`; None: the authors' (cosine or two_phase, in "v1" constant).
        variant: "iclr", the formulas of the authors' later code, or "v1", those of their first.
        task: "nlg" or "nlu". None goes by the context, "nlu" where it has logits of a classifier; what a term needs
            and its weight must be known before that and are then those of "nlg", so a trainer says `for_task(...)`.

    Raises:
        RecipeError: a value that is none of these.
    """

    weight: float | None = None
    schedule: str | None = None
    variant: Variant = "iclr"
    task: Task | None = None

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._check_choice("variant", ("iclr", "v1"))
        self._check_choice("task", ("nlg", "nlu", None))
        object.__setattr__(self, "_asked", {spec.name: getattr(self, spec.name) for spec in fields(self)})
        for name, value in self._paper().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_weight(self)

    def _paper(self) -> dict[str, Any]:
        """What stands where a field was left None."""
        return {
            "weight": PAPER[self.variant, self.task or "nlg"][self.name],
            "schedule": _SCHEDULES[self.name] if self.variant == "iclr" else "constant",
        }

    def for_task(self, task: Task) -> Self:
        """The same term for a task, where none was given: with that task's weight and settings, if left None."""
        if self.task is not None:
            return self
        asked: dict[str, Any] = self._asked  # type: ignore[attr-defined]
        return replace(self, **{**asked, "task": task})

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"logits"} if self.task == "nlu" else {"hidden"})

    def is_nlu(self, context: Context) -> bool:
        return self.task == "nlu" or (self.task is None and context.logits is not None)

    def of(self, context: Context, *names: str) -> list[Any]:
        """What stands in a context under these names; UnsupportedError where something is missing."""
        missing = [name for name in names if getattr(context, name) is None]
        if missing:
            raise UnsupportedError(
                f"The term {self.name!r} was given no {', '.join(missing)}; give the term the task of its trainer: "
                'task="nlu" for a classifier, task="nlg" for a language model.'
            )
        return [getattr(context, name) for name in names]

    def _check_choice(self, field: str, choices: tuple[str | None, ...]) -> None:
        if getattr(self, field) not in choices:
            expected = ", ".join(map(repr, choices))
            raise RecipeError(f"{self.name}: {field} is {getattr(self, field)!r}; choose one of {expected}.")


def check_count(term: Any, field: str, least: int) -> None:
    """Raises RecipeError unless a field is an integer of at least `least`."""
    value = getattr(term, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{term.name}: {field} must be an integer of at least {least}, got {value!r}.")


def at_least_float32(Z: Tensor) -> Tensor:
    return Z.to(torch.promote_types(Z.dtype, torch.float32))


def nothing(Z: Tensor) -> Tensor:
    """Zero, with a gradient of zero: for a batch that has too few rows for a term."""
    return at_least_float32(Z).sum() * 0
