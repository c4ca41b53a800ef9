"""Decomposing or calibrating once, offline: what a recipe's adapter starts from, where training takes it from."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..quiet import quiet
from .conflicts import quantizes_residual
from .planning import Plan, plan
from .schema import Recipe

__all__ = [
    "StartReport",
    "StatisticsReport",
    "clear_starts",
    "clear_statistics",
    "list_starts",
    "prepare_starts",
    "starts_table",
    "statistics_line",
]


@dataclass(frozen=True)
class StartReport:
    """What `prepare_starts` did.

    Attributes:
        path: the folder of the cache. method, model: of the recipe.
        layers: adapted layers. found: those whose start was there already. computed: the others.
        entries, bytes: of the whole cache afterwards. seconds: it took, loading the model included.
    """

    path: str
    method: str
    model: str
    layers: int
    found: int
    computed: int
    entries: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class StatisticsReport:
    """What `prepare_starts` did for a method that starts from data: its statistics are kept, and read by training.

    Attributes:
        path: the folder of the cache. method, model: of the recipe. data: what was read.
        layers: adapted layers, without those to which no rank was given. inputs: distinct inputs of theirs.
        tokens: counted. found: the statistics were there already.
        entries, bytes: of the whole cache afterwards. seconds: it took, loading the model included.
    """

    path: str
    method: str
    model: str
    data: str
    layers: int
    inputs: int
    tokens: int
    found: bool
    entries: int
    bytes: int
    seconds: float


def prepare_starts(recipe: Recipe, folder: str | Path | None = None) -> StartReport | StatisticsReport:
    """Decompose the weights that the recipe adapts, and keep the starts in `folder`; or, for a method that starts from
    data, calibrate on it and keep the statistics.

    Entries are found by the bytes of the weight, the method, rank, scaling, seed and settings, so any recipe with the
    same ones takes them; a second call computes nothing. Several processes may fill one folder.

    Args:
        folder: default: `starts` (of statistics `calibration`) in the folder of `LLMREG_CACHE` (by default
            `~/.cache/llmreg`), where `train` looks.

    Raises:
        RecipeError: the recipe is wrong, or its method starts from noise, so that there is nothing to keep.
        LlmregError: a weight or layer that the method cannot work on.
    """
    from ..adapters.start_cache import contents, use_starts

    started = time.perf_counter()
    with quiet():
        settled = plan(recipe, new_output=False)
        if quantizes_residual(settled.adapter):
            raise recipe.error(
                ("adapter", "residual"),
                "a quantised residual is made together with its adapter when training begins; there is nothing to keep "
                "before.",
            )
        if settled.method.takes_data():
            return _prepare_statistics(settled, folder, started)
        target = _folder(folder)
        if settled.method.kind != "additive":
            start = "zero" if settled.method.kind == "bone" else "random numbers"
            raise recipe.error(
                ("adapter", "method"),
                f"{settled.method.name} starts from {start}, so there is nothing to decompose before training.",
            )
        _check_writable(target)
        from peft import get_peft_model

        from .base_model import load_base
        from .building import located_in_adapter
        from .data import load_training_data

        classes = load_training_data(recipe).classes if recipe.task == "classification" else None
        model, _ = load_base(recipe, gpu=not settled.training.use_cpu, classes=classes)
        with use_starts(target) as cache, located_in_adapter(recipe, model):
            get_peft_model(model, settled.adapter)
    assert cache is not None
    kept = contents(target)
    return StartReport(
        path=str(target),
        method=settled.method.name,
        model=recipe.model.name,
        layers=cache.layers,
        found=cache.hits,
        computed=cache.layers - cache.hits,
        entries=len(kept),
        bytes=sum(entry.bytes for entry in kept),
        seconds=time.perf_counter() - started,
    )


def _prepare_statistics(settled: Plan, folder: str | Path | None, started: float) -> StatisticsReport:
    from .base_model import load_base
    from .building import build_trainer, check_chat_template
    from .calibrating import calibration_folder, kept_statistics, start_on_data
    from .data import load_training_data

    recipe = settled.recipe
    target = calibration_folder() if folder is None else Path(folder).expanduser()
    _check_writable(target)
    data = load_training_data(recipe)
    model, tokenizer = load_base(recipe, gpu=not settled.training.use_cpu, classes=data.classes)
    check_chat_template(recipe, data, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        settled.training.output_dir = scratch  # which a trainer makes
        trainer = build_trainer(settled, model, tokenizer, data)
        done = start_on_data(settled, trainer, tokenizer, target)
    assert done is not None
    kept = kept_statistics(target)
    return StatisticsReport(
        path=str(target),
        method=settled.method.name,
        model=recipe.model.name,
        data=done["data"],
        layers=len(trainer.accelerator.unwrap_model(trainer.model).base_model.targeted_module_names),
        inputs=done["inputs"],
        tokens=done["tokens"],
        found=done["cached"],
        entries=len(kept),
        bytes=sum(path.stat().st_size for path in kept),
        seconds=time.perf_counter() - started,
    )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(
            f"the cache {folder} cannot be written to ({error.strerror}); give another folder with --output."
        ) from None


def clear_starts(folder: str | Path | None = None) -> tuple[int, int]:
    """Remove all starts from the cache, and nothing else in the folder; (count, bytes) removed."""
    from ..adapters.start_cache import clear

    return clear(_folder(folder))


def clear_statistics() -> tuple[int, int]:
    """Remove the kept statistics; (count, bytes) removed."""
    from . import calibrating

    return calibrating.clear_statistics(calibrating.calibration_folder())


def statistics_line() -> str | None:
    """What is kept of calibrations, in a sentence; None: nothing."""
    from .calibrating import calibration_folder, kept_statistics

    kept = kept_statistics(calibration_folder())
    size = sum(path.stat().st_size for path in kept) / 1e6
    return f"{calibration_folder()}: statistics of {len(kept)} calibrations, {size:.1f} MB" if kept else None


def list_starts(folder: str | Path | None = None) -> list[dict[str, Any]]:
    """What the cache holds, last used first."""
    from ..adapters.start_cache import contents

    return [
        {**asdict(entry), "last_use": entry.last_use.isoformat(" ", "seconds")} for entry in contents(_folder(folder))
    ]


def starts_table(folder: str | Path | None = None) -> Any:
    """`list_starts` as a table for `rich`."""
    from rich.table import Table

    rows = list_starts(folder)
    title = f"{_folder(folder)}: {len(rows)} starts, {sum(row['bytes'] for row in rows) / 1e6:.1f} MB"
    table = Table("method", "rank", "layer", "MB", "last use", title=title, title_justify="left")
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["method"], str(row["rank"]), shape, f"{row['bytes'] / 1e6:.1f}", row["last_use"])
    return table


def _folder(folder: str | Path | None) -> Path:
    from ..adapters.start_cache import default_folder

    return default_folder() if folder is None else Path(folder).expanduser()
