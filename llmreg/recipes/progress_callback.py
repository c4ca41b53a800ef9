"""Training progress: one bar on a terminal, nothing elsewhere; takes the place of transformers' printing callbacks."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

__all__ = ["TrainingBar", "use_training_bar"]


class TrainingBar(TrainerCallback):
    """A bar over the optimizer steps with the latest loss or reward, on stderr if that is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty() or not state.is_world_process_zero:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("training", total=state.max_steps)
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = next((name for name in ("reward", "loss") if logs and logs.get(name) is not None), None)
        if self._bar is not None and logs and shown:
            self._bar.update(self._task, description=f"training, {shown} {float(logs[shown]):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen; also after an interruption."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def use_training_bar(trainer: Any) -> TrainingBar:
    """Replace the callbacks of `trainer` that print by a `TrainingBar`, which is returned."""
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    bar = TrainingBar()
    trainer.callback_handler.callbacks.insert(0, bar)  # closed before anything else is measured and shown
    return bar
