"""Measuring a model on several sources at once: exact match where there are prompts, perplexity where there is text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..progress import track
from .scoring import exact_match, perplexity

__all__ = ["Measurement", "Suite", "forgetting", "measure"]


@dataclass(frozen=True)
class Suite:
    """Rows to measure on, under a name; `prompt`/`completion` rows are matched, `text` rows predicted."""

    name: str
    rows: Sequence[dict[str, str]]

    @property
    def metric(self) -> str:
        """ "exact match" or "perplexity"."""
        return "exact match" if "prompt" in self.rows[0] else "perplexity"


@dataclass(frozen=True)
class Measurement:
    """One score before and after training.

    Attributes:
        name: of the source. metric: "exact match" or "perplexity". rows: how many were measured.
        role: "task" (should rise) or "forgetting" (should not change).
    """

    name: str
    metric: str
    role: str
    rows: int
    before: float
    after: float

    @property
    def forgotten(self) -> float | None:
        """What training cost, positive = worse; None for a task. See `forgetting`."""
        return forgetting(self.metric, self.before, self.after) if self.role == "forgetting" else None


def forgetting(metric: str, before: float, after: float) -> float:
    """Exact match: before - after. Perplexity: the rise of the mean loss in nats a token, as in PEFT's benchmark."""
    return before - after if metric == "exact match" else math.log(after) - math.log(before)


def measure(
    model: Any, tokenizer: Any, suites: Sequence[Suite], *, batch_size: int = 64, max_new_tokens: int | None = None
) -> dict[str, float]:
    """Score `model` on every suite, by name.

    Raises:
        RecipeError: rows that cannot be scored.
    """
    scores = {}
    for suite in track(suites, "evaluating", unit="sources"):
        if suite.metric == "exact match":
            score = exact_match(model, tokenizer, suite.rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
        else:
            score = perplexity(model, tokenizer, [row["text"] for row in suite.rows], batch_size=min(batch_size, 16))
        scores[suite.name] = score.value
    return scores
