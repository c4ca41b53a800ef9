"""Running a recipe: load, measure, train with TRL, measure again, save; every file appears whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.start_cache import default_folder, use_starts
from ..errors import RecipeError
from ..evaluation.measure import Suite, measure
from ..evaluation.report import Report
from ..quiet import quiet
from .base_model import load_base
from .building import build_trainer, check_chat_template
from .calibrating import start_on_data
from .data import Classes, load_training_data, located, scoring_rows
from .planning import plan
from .progress_callback import TrainingBar
from .reinforcement import steps_of_a_generation
from .results import Scores, refuse_diverged, report_of, save_adapter, write_reports
from .resuming import Checkpoints, differences, find_checkpoint, finish_from
from .schema import Recipe
from .tracking import TrackedScores

__all__ = ["measure_suites", "run", "suites_of"]


@dataclass
class _Clock:
    """Seconds spent under each name."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "init", "evaluate", "train", "save"), 0.0)
    )
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def move(self, seconds: float, source: str, target: str) -> None:
        """Account `seconds` spent under `source` to `target`."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def split(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self.started}


def run(recipe: Recipe, *, resume: bool | str = False, allow_changes: bool = False) -> Report:
    """Train what the recipe says; write `adapter/`, `recipe.yaml`, `report.json` and `report.html` into its folder.

    Args:
        recipe: from `load_recipe` or `make_recipe`.
        resume: continue the run in `output.dir` from its newest checkpoint (True) or from one by name, exactly as if it
            had not been interrupted.
        allow_changes: resume although the recipe would have trained differently.

    Raises:
        RecipeError: the recipe, its data or its model are wrong; nothing is left behind.
        LlmregError: a weight or layer that the method cannot work on.
        TrainingStopped: SIGTERM came while training; a checkpoint was written.
    """
    clock = _Clock()
    with quiet(), clock.timing("load"):
        settled = plan(recipe, new_output=not resume)
        checkpoint, changed = _found_checkpoint(recipe, resume, allow_changes)
    with quiet(), _claimed(recipe) as folder:
        with clock.timing("load"):
            data = load_training_data(recipe)
            suites = suites_of(recipe, data.classes)
            model, tokenizer = load_base(recipe, gpu=not settled.training.use_cpu, classes=data.classes)
            check_chat_template(recipe, data, tokenizer)
        with clock.timing("evaluate"):
            before = measure_suites(recipe, model, tokenizer, suites)
        with clock.timing("init"), use_starts(_existing_starts()):
            trainer = build_trainer(settled, model, tokenizer, data)
        heldout = _Heldout(trainer, data.heldout is not None)
        with clock.timing("evaluate"):
            heldout.measure("before")  # of the base: a start from data need not be zero (EoRA)
        with clock.timing("init"):
            calibrated = start_on_data(settled, trainer, tokenizer)
        checkpoints = Checkpoints(recipe, every=steps_of_a_generation(settled.training))
        tracked = TrackedScores(
            trainer,
            before,
            measure=lambda: measure_suites(recipe, _plain(trainer), tokenizer, suites),
            trained=checkpoints.go_on,
        )
        with checkpoints.stopping_on_sigterm(trainer):
            with clock.timing("train"):
                outcome = _train(trainer, checkpoints, checkpoint)
            clock.move(tracked.seconds, "train", "evaluate")
            with clock.timing("evaluate"):
                heldout.measure("after")
        refuse_diverged(recipe, trainer.model)
        with clock.timing("save"):
            export = save_adapter(settled, trainer.model, folder)
        report = report_of(
            settled,
            trainer,
            outcome,
            folder,
            classes=data.classes,
            suites=suites,
            before=before,
            after=tracked.after,
            heldout_loss=heldout.losses or None,
            export=export,
            seconds=clock.split(),
            changed_on_resume=changed,
            calibration=calibrated,
        )
        write_reports(report, folder)
    return report


def _found_checkpoint(
    recipe: Recipe, resume: bool | str, allow_changes: bool
) -> tuple[Path | None, tuple[str, ...] | None]:
    """The checkpoint to continue from, and how the recipe has changed since; None, None for a new run."""
    if not resume:
        return None, None
    checkpoint = find_checkpoint(recipe, None if resume is True else resume)
    changed = differences(recipe, checkpoint)
    if changed and not allow_changes:
        raise RecipeError(
            f"the recipe is not the one that made {checkpoint.name}: {'; '.join(changed)}. Undo that, or allow it with "
            "--allow-changes."
        )
    return checkpoint, changed


@contextmanager
def _claimed(recipe: Recipe) -> Iterator[Path]:
    """The output folder; what is still empty in it when the run ends or is interrupted is removed."""
    folder = Path(recipe.output.dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise recipe.error(("output", "dir"), f"{folder} cannot be created: {error.strerror}.") from None
    try:
        yield folder
    finally:
        for empty in (folder / "checkpoints", folder):
            try:
                empty.rmdir()
            except OSError:  # not empty, or never made
                pass


def _existing_starts() -> Path | None:
    """The default cache of starts, where `llmreg init` has made one."""
    folder = default_folder()
    return folder if folder.is_dir() else None


# -- evaluation -----------------------------------------------------------------------------------------------


def suites_of(recipe: Recipe, classes: Classes | None = None) -> dict[str, list[Suite]]:
    """What is measured, by role; a source that is both is measured once, as a task."""
    suites: dict[str, list[Suite]] = {"task": [], "forgetting": []}
    for role, key in (("task", "tasks"), ("forgetting", "forgetting")):
        for index, name in enumerate(getattr(recipe.evaluation, key)):
            with located(recipe, "evaluation", key, index):
                suites[role].append(Suite(name, scoring_rows(recipe, name, classes)))
    return suites


def measure_suites(recipe: Recipe, model: Any, tokenizer: Any, suites: dict[str, list[Suite]]) -> Scores:
    settings = recipe.evaluation
    unique = {suite.name: suite for role in suites.values() for suite in role}
    with located(recipe, "evaluation"):
        return measure(
            model,
            tokenizer,
            list(unique.values()),
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            max_length=recipe.training.get("max_length") or 512,
        )


class _Heldout:
    """The trainer's own loss on the held-out rows, before and after."""

    def __init__(self, trainer: Any, wanted: bool) -> None:
        self.trainer = trainer
        self.wanted = wanted
        self.losses: dict[str, float] = {}

    def measure(self, when: str) -> None:
        if self.wanted:
            self.losses[when] = float(self.trainer.evaluate()["eval_loss"])


# -- training -------------------------------------------------------------------------------------------------


def _train(trainer: Any, checkpoints: Checkpoints, checkpoint: Path | None) -> Any:
    bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TrainingBar)]
    trainer.add_callback(checkpoints)
    try:
        done = None if checkpoint is None else finish_from(trainer, checkpoint)
        return done or trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        for bar in bars:
            bar.close()


def _plain(trainer: Any) -> Any:
    """The trained model without the autocast that accelerate wraps around it: measured as the base was."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
