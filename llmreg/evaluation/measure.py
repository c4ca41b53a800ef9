"""Measuring a model on several sources at once; what is measured follows from the columns of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..progress import track
from .choices import classification, preference_accuracy
from .scoring import exact_match, perplexity

__all__ = ["Measurement", "Suite", "forgetting", "measure"]


@dataclass(frozen=True)
class Suite:
    """Rows to measure on, under a name; their columns decide what is measured."""

    name: str
    rows: Sequence[dict[str, Any]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `measure` returns for these rows."""
        columns = self.rows[0]
        if "label" in columns:
            return ("accuracy", "macro F1")
        if "chosen" in columns:
            return ("preference accuracy",)
        return ("exact match",) if "prompt" in columns else ("perplexity",)


@dataclass(frozen=True)
class Measurement:
    """One score before and after training.

    Attributes:
        name: of the source. rows: how many were measured.
        metric: "exact match", "preference accuracy", "accuracy", "macro F1" or "perplexity".
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
    """Perplexity: the rise of the mean loss in nats a token, as in PEFT's benchmark. Others: before - after.

    >>> forgetting("exact match", before=1.0, after=0.25)
    0.75
    >>> round(forgetting("perplexity", before=2.0, after=4.0), 3)
    0.693
    """
    return math.log(after) - math.log(before) if metric == "perplexity" else before - after


def measure(
    model: Any,
    tokenizer: Any,
    suites: Sequence[Suite],
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    max_length: int = 512,
) -> dict[tuple[str, str], float]:
    """Score `model` on every suite, by the suite's name and the metric.

    `max_length` is that of the texts that are classified, in tokens.

    Raises:
        RecipeError: rows that cannot be scored.
    """
    scores: dict[tuple[str, str], float] = {}
    for suite in track(suites, "evaluating", unit="sources"):
        for metric, value in _scores(model, tokenizer, suite, batch_size, max_new_tokens, max_length).items():
            scores[suite.name, metric] = value
    return scores


def _scores(
    model: Any, tokenizer: Any, suite: Suite, batch_size: int, max_new_tokens: int | None, max_length: int
) -> dict[str, float]:
    metric = suite.metrics[0]
    if metric == "accuracy":
        return classification(model, tokenizer, suite.rows, batch_size=batch_size, max_length=max_length)
    if metric == "preference accuracy":
        score = preference_accuracy(model, tokenizer, suite.rows, batch_size=min(batch_size, 16))
    elif metric == "exact match":
        score = exact_match(model, tokenizer, suite.rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    else:
        score = perplexity(model, tokenizer, [row["text"] for row in suite.rows], batch_size=min(batch_size, 16))
    return {metric: score.value}
