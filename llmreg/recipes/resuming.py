"""Continuing a run: checkpoints that carry their recipe, one on SIGTERM, and the recipe compared before going on.

A checkpoint is whole once its `recipe.yaml` is there, which is written last. Trainer's state files (optimizer, random
state) are read only here, from the run's own folder, by transformers with `weights_only`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from ..errors import RecipeError, TrainingStopped
from ..files import write_text
from .load import dump_recipe
from .schema import Recipe

__all__ = ["Checkpoints", "check_same_recipe", "find_checkpoint"]

_RECIPE = "recipe.yaml"
#: Sections and fields that do not change what is trained.
_WITHOUT_EFFECT = tuple(
    "output. evaluation.tasks evaluation.forgetting evaluation.limit evaluation.batch_size evaluation.max_new_tokens "
    "training.logging_ training.save_ training.eval_ training.report_to training.run_name "
    "training.dataloader_num_workers".split()
)


class Checkpoints(TrainerCallback):
    """Puts the recipe into every checkpoint, and on SIGTERM makes one after the running step and ends the training."""

    def __init__(self, recipe: Recipe) -> None:
        self.text = dump_recipe(recipe)
        self.stopped = False
        self.last: Path | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            write_text(self.last / _RECIPE, self.text)

    @contextmanager
    def stopping_on_sigterm(self) -> Iterator[None]:
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

        signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.stopped:
            raise TrainingStopped(
                f"stopped by SIGTERM after writing {self.last}; continue with --resume."
                if self.last
                else "stopped by SIGTERM before the first step."
            )


def find_checkpoint(recipe: Recipe, name: str | None) -> Path:
    """The checkpoint to continue from: the newest whole one of the run in `output.dir`, or the one named.

    Args:
        name: as in the folder, such as "checkpoint-40"; None = the newest.

    Raises:
        RecipeError: there is none, it is not whole, or the run is finished.
    """
    folder = Path(recipe.output.dir).expanduser()
    if (folder / "adapter").exists():
        raise recipe.error(("output", "dir"), f"the run in {folder} is finished; nothing is left to resume.")
    found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=_step)
    whole = [path for path in found if _step(path) >= 0 and (path / _RECIPE).is_file()]
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


def check_same_recipe(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to continue under a recipe that would have trained differently.

    Raises:
        RecipeError: with every difference.
    """
    there = _flat(yaml.safe_load((checkpoint / _RECIPE).read_text(encoding="utf-8")) or {})
    here = _flat(recipe.resolved())
    differing = [
        key
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key) and not key.startswith(_WITHOUT_EFFECT)
    ]
    if differing:
        listed = "; ".join(
            f"{key} {there.get(key, '(not given)')} there, {here.get(key, '(not given)')} here" for key in differing
        )
        raise RecipeError(
            f"the recipe is not the one that made {checkpoint.name}: {listed}. Undo that, or allow it "
            "with --allow-changes."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
