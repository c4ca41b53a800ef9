"""What a regulariser is: a name, a weight over time, what it needs, and a scalar of that.

The side of the trainers fetches every need once, from the forward pass that the task's loss is taken from, and makes
the gradient `task + weight(t) dR`, whatever the accumulation and the number of processes. A regulariser itself is a
pure function of its `Context` and knows no trainer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor

from ..errors import RecipeError

__all__ = ["SCHEDULES", "Context", "Head", "Need", "Regularizer", "check_term", "check_weight", "schedule_factor"]

#: `hidden`: the inputs of the language-model head at scored positions. `teacher`: the same of the base without its
#: adapters (of logits where the task is classification). `log_probs`: of the labels. `logits`: of a classifier.
#: `advantages`: of each token, in reinforcement learning. `rows`: which sequence a token belongs to, so not with
#: packing. `model`: the wrapped model itself.
Need = Literal["hidden", "teacher", "log_probs", "logits", "advantages", "rows", "model"]


@dataclass(frozen=True)
class Head:
    """A language-model head as the trainer uses it: logits are `cap(scale (h W^T + b)) / temperature`.

    Attributes:
        weight: (vocabulary, hidden), whole or sharded. bias: (vocabulary,) or None.
        softcap: `cap(z) = softcap tanh(z / softcap)`; None: no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        """The number of tokens, of a partitioned weight (ZeRO-3) too, which shows none of them."""
        return getattr(self.weight, "ds_shape", self.weight.shape)[0]


@dataclass
class Context:
    """What one forward pass of the student offers, at its `n` scored positions of all rows, in order.

    A position is scored where the token after it carries the task's loss: `labels[:, 1:] != -100`.

    Attributes:
        progress: share of all optimizer steps that is done, 0 to 1.
        labels: (n,) the token after each position. rows: (n,) which sequence of the batch it belongs to.
        hidden: (n, hidden) inputs of the head, with gradients. teacher_hidden: (n, hidden) without.
        log_probs: (n,) of the labels, with gradients, at the head's temperature.
        head: what makes logits of hidden states; teacher_head where it is another.
        logits: (batch, classes) of a classifier, with gradients; teacher_logits without.
        model: the model that is trained, for terms on its parameters.
        loss_from: the output that the trainer's loss is taken from: "log_probs" (TRL), "loss" or "logits".
        advantages: (n,). old_log_probs: (n,) of the policy that sampled; None: the current policy is that.
        extra: what a regulariser's own trainer side prepared, (n,) each, by name.
        log: numbers to be logged beside the term, by their full key; the regulariser fills it.
    """

    progress: float = 0.0
    labels: Tensor | None = None
    rows: Tensor | None = None
    hidden: Tensor | None = None
    teacher_hidden: Tensor | None = None
    log_probs: Tensor | None = None
    head: Head | None = None
    teacher_head: Head | None = None
    logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    advantages: Tensor | None = None
    old_log_probs: Tensor | None = None
    model: Any = None
    loss_from: str | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    log: dict[str, float | Tensor] = field(default_factory=dict)


@runtime_checkable
class Regularizer(Protocol):
    """A term of the loss.

    Attributes:
        name: what it is called in recipes and logs. weight: its coefficient at full strength.
        schedule: how the coefficient goes over training, one of `SCHEDULES`.
        needs: what must stand in the context.
        reduction: "tokens", the loss is a mean over scored tokens, and micro-batches count by how many they have; or
            "batch", it is a statistic of a batch, and micro-batches count alike.
    """

    name: str
    weight: float
    schedule: str
    needs: frozenset[Need]
    reduction: Literal["tokens", "batch"]

    def loss(self, context: Context) -> Tensor:
        """The term, a scalar with gradients, without its weight; finite where no token is scored, too."""
        ...


def _cosine(progress: float) -> float:
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def _two_phase(progress: float) -> float:
    return min(1.0, max(0.0, (progress - 0.2) / 0.05))


#: Factor on a weight by the share of training that is done. "cosine" and "two_phase" are BA-LoRA's (authors' code):
#: from 1 to 0.1; and 0 for a fifth, then a ramp to 1 over a twentieth. The warm-ups reach 1 after a tenth.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "two_phase": _two_phase,
    "linear_warmup": lambda progress: min(1.0, progress / 0.1),
    "quadratic_warmup": lambda progress: min(1.0, progress / 0.1) ** 2,
}


def schedule_factor(schedule: str, progress: float) -> float:
    """The factor of a named schedule; `progress` outside 0 to 1 is taken as its nearer end."""
    return SCHEDULES[schedule](min(1.0, max(0.0, progress)))


def check_weight(regularizer: Any) -> None:
    """Raises RecipeError unless `weight` is a finite number >= 0 and `schedule` is known."""
    weight, schedule = regularizer.weight, regularizer.schedule
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise RecipeError(f"{regularizer.name}: weight must be a number >= 0, got {weight!r}.")
    if schedule not in SCHEDULES:
        near = difflib.get_close_matches(str(schedule), SCHEDULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SCHEDULES)}."
        raise RecipeError(f"{regularizer.name}: schedule {schedule!r} is unknown; {hint}")


def check_term(regularizer: Any) -> None:
    """Raises RecipeError where a regulariser of anybody's does not hold to `Regularizer`."""
    check_weight(regularizer)
    for need in regularizer.needs:
        if need not in get_args(Need):
            raise RecipeError(f"{regularizer.name}: it needs {need!r}; known are {', '.join(get_args(Need))}.")
    if regularizer.reduction not in ("tokens", "batch"):
        raise RecipeError(f"{regularizer.name}: reduction must be 'tokens' or 'batch', got {regularizer.reduction!r}.")
