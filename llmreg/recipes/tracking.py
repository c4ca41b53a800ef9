"""Scores before and after training, sent to the trackers of `report_to` while they still listen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from .progress_callback import TrainingBar
from .results import Scores

__all__ = ["TrackedScores"]


class TrackedScores(TrainerCallback):
    """Logs `score/before/...` at the first step and measures and logs `score/after/...` at the end of the training.

    Trackers close in `on_train_end`, and callbacks run in order: so this one goes before them, and measures there.

    Args:
        before: scores of the base. measure: what gives the scores after.
        trained: called when the training is over; whether to measure, or to end at once.

    Attributes:
        after: the scores after training. seconds: that measuring them took.
    """

    def __init__(
        self, trainer: Any, before: Scores, *, measure: Callable[[], Scores], trained: Callable[[], bool]
    ) -> None:
        self.before = before
        self.after: Scores = {}
        self.seconds = 0.0
        self._trainer, self._measure, self._trained = trainer, measure, trained
        self._logged = False
        handler = trainer.callback_handler  # after the progress bar, which has to be gone before others are shown
        handler.callbacks.insert(1 if isinstance(handler.callbacks[0], TrainingBar) else 0, self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._logged:
            self._logged = True
            self._log("before", self.before)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._trained():
            return
        started = time.perf_counter()
        self.after = self._measure()
        self.seconds = time.perf_counter() - started
        self._log("after", self.after)

    def _log(self, when: str, scores: Scores) -> None:
        if scores:
            values = {f"score/{when}/{name} ({metric})": value for (name, metric), value in scores.items()}
            self._trainer.callback_handler.on_log(
                self._trainer.args, self._trainer.state, self._trainer.control, values
            )
