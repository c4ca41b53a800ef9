"""Continuing a run: checkpoints that carry their recipe, one on SIGTERM, and the recipe compared before going on.

A checkpoint is whole when the recipe, the adapter, the optimizer, scheduler and random states and Trainer's own state,
which is written last, are all there. These state files are read only here, from the run's own folder, by transformers
with `weights_only`.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from ..errors import TrainingStopped
from ..files import write_text
from .document import parse
from .load import dump_recipe
from .schema import Recipe

__all__ = ["Checkpoints", "differences", "find_checkpoint", "finish_from", "is_whole"]

_RECIPE = "recipe.yaml"
#: Sections and fields that do not change what is trained.
_WITHOUT_EFFECT = tuple(
    "output. evaluation.tasks evaluation.forgetting evaluation.limit evaluation.batch_size evaluation.max_new_tokens "
    "training.logging_ training.save_ training.report_to training.run_name "
    "training.dataloader_num_workers".split()
)


class _Interrupted(BaseException):
    """SIGTERM came after the last step."""


class Checkpoints(TrainerCallback):
    """Puts the recipe into every checkpoint, and on SIGTERM makes one after the running step and ends the training.

    Args:
        every: SIGTERM waits for a step that this number divides (grpo's steps on one batch of completions).

    Attributes:
        stopped: whether SIGTERM came.
        trained: set when the last step is over: from then on SIGTERM does not wait for anything.
    """

    def __init__(self, recipe: Recipe, every: int = 1) -> None:
        self.text = dump_recipe(recipe)
        self.every = every
        self.stopped = self.trained = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped and state.global_step % self.every == 0:
            control.should_save = control.should_training_stop = True
        self._mark(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark(args, state, control)

    def _mark(self, args: Any, state: Any, control: Any) -> None:
        """Before Trainer fills the folder: it removes older checkpoints as soon as the new one is complete."""
        if control.should_save and state.is_world_process_zero:
            write_text(_folder(args, state) / _RECIPE, self.text)

    def go_on(self) -> bool:
        """Called after the last step: whether to go on with what comes after it."""
        self.trained = True
        return not self.stopped

    @contextmanager
    def stopping_on_sigterm(self, trainer: Any) -> Iterator[None]:
        """SIGTERM in this context ends the training with a checkpoint; a second one does what it did before.

        Raises:
            TrainingStopped: at the end of the context, if the signal came.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def stop(number: int, frame: Any) -> None:
            self.stopped = True
            signal.signal(signal.SIGTERM, before)
            if self.trained:
                raise _Interrupted

        signal.signal(signal.SIGTERM, stop)
        try:
            yield
        except _Interrupted:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.stopped:
            raise TrainingStopped(self._last_words(trainer))

    def _last_words(self, trainer: Any) -> str:
        folder = _folder(trainer.args, trainer.state)
        if not trainer.state.global_step:
            return "stopped by SIGTERM before the first step."
        if not is_whole(folder):  # the signal came after the last step, which the recipe does not save
            write_text(folder / _RECIPE, self.text)
            trainer._save_checkpoint(trainer.model, trial=None)
        return f"stopped by SIGTERM after writing {folder}; continue with --resume."


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def is_whole(checkpoint: Path) -> bool:
    """Whether everything is there that an exact continuation needs."""
    names = (_RECIPE, SAFETENSORS_WEIGHTS_NAME, "optimizer.pt", "scheduler.pt", "trainer_state.json")
    if not all((checkpoint / name).is_file() for name in names) or not list(checkpoint.glob("rng_state*.pth")):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:  # written last, and not by rename
        return False
    return True


def finish_from(trainer: Any, checkpoint: Path) -> Any:
    """If `checkpoint` is of the last step: load it, run the end of the training and return its outcome; else None.

    Trainer itself would do one more step.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return None
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    for name in ("on_train_begin", "on_step_begin", "on_train_end"):
        getattr(trainer.callback_handler, name)(trainer.args, trainer.state, trainer.control)
    losses = [line["train_loss"] for line in state.log_history if "train_loss" in line]
    return TrainOutput(state.global_step, losses[-1] if losses else math.nan, {})


def find_checkpoint(recipe: Recipe, name: str | None) -> Path:
    """The checkpoint to continue from: the newest whole one of the run in `output.dir`, or the one named.

    Args:
        name: as in the folder, such as "checkpoint-40"; None = the newest.

    Raises:
        RecipeError: there is none, it is not whole, or the run is finished.
    """
    folder = Path(recipe.output.dir).expanduser()
    if (folder / "report.json").exists():
        raise recipe.error(("output", "dir"), f"the run in {folder} is finished; nothing is left to resume.")
    found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=_step)
    whole = [path for path in found if _step(path) >= 0 and is_whole(path)]
    if name is not None:
        chosen = [path for path in whole if path.name == name]
        known = ", ".join(path.name for path in whole) or "none"
        if not chosen:
            raise recipe.error(("output", "dir"), f"{folder} has no whole checkpoint {name!r}; whole ones: {known}.")
        return chosen[0]
    if not whole:
        raise recipe.error(
            ("output", "dir"),
            f"{folder} has no whole checkpoint to resume from; start again without --resume, and write "
            "training.save_strategy: steps to have some.",
        )
    return whole[-1]


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def differences(recipe: Recipe, checkpoint: Path) -> tuple[str, ...]:
    """Where the recipe would have trained differently from the one that made `checkpoint`, a phrase each."""
    there = _flat(parse((checkpoint / _RECIPE).read_text(encoding="utf-8"), _RECIPE).values)
    here = _flat(recipe.resolved())
    keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    return tuple(
        f"{key} {there.get(key, '(not given)')} there, {here.get(key, '(not given)')} here"
        for key in keys
        if not key.startswith(_WITHOUT_EFFECT)
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
