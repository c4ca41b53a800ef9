"""Calibration of a recipe: batches of its data, the cache of statistics, and the start of the adapter from them.

Statistics are kept in `calibration` in the folder of `LLMREG_CACHE`, found by the base as it is loaded, the tensors of
the batches, and the settings; so a second run, a resumed one, or one after `llmreg init` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapters.start_cache import default_limit
from ..adapters.start_key import fast_digest
from ..calibration import CalibrationCache
from ..errors import RecipeError
from ..quiet import quiet
from ..trainers import InitializationReport, initialize
from ..trainers.calibration_data import batches_of_rows, batches_of_trainer, choose_rows
from ..weights import identity_hash
from ..weights.digests import cache_file
from ..weights.hashing import update
from .data import in_format, located
from .planning import Plan
from .schema import Calibration, Recipe
from .sources import load_source

__all__ = ["calibration_folder", "clear_statistics", "kept_statistics", "start_on_data"]

#: What rows of `calibration.data` may hold; the first that fits is taken.
_FORMATS = (
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("messages",),
    ("conversations",),
    ("text",),
    ("prompt",),
)
_NAME = re.compile(r"calibration-[0-9a-f]{64}\.safetensors")


def start_on_data(settled: Plan, trainer: Any, tokenizer: Any, folder: Path | None = None) -> dict[str, Any] | None:
    """Calibrate and start the adapter of `trainer`, which must not have its optimizer yet.

    Args:
        folder: of the cache; default: `calibration_folder()`.

    Returns:
        What was done, as the run's report has it under `calibration`; None for methods that take no data.

    Raises:
        RecipeError: data that cannot be read or has no token that counts, a budget that is too small; where it is
            written. Or `LLMREG_CACHE_LIMIT` is no size.
    """
    if not settled.method.takes_data():
        return None
    recipe, most = settled.recipe, default_limit()
    settings = recipe.calibration or Calibration()
    batches = _batches(recipe, settings, trainer, tokenizer)
    folder = folder or calibration_folder()
    cache = CalibrationCache(folder, _base(recipe, settings, trainer.model), _fingerprint(batches))
    with _located(recipe), quiet():
        report = initialize(
            trainer,
            batches,
            max_tokens=settings.max_tokens,
            memory_budget=settings.budget,
            exact=settings.exact,
            sketch=settings.sketch,
            cache=cache,
            seed=recipe.seed,
        )
    _make_room(folder, most)
    return _in_short(settled, settings, report)


@contextmanager
def _located(recipe: Recipe) -> Iterator[None]:
    """Refusals of this context get the place of what they are about."""
    try:
        yield
    except RecipeError as error:
        about = ("memory_budget",) if "memory budget" in str(error) else ()
        raise recipe.error(("calibration", *about), str(error)) from None


def _batches(recipe: Recipe, settings: Calibration, trainer: Any, tokenizer: Any) -> list[Any]:
    size = settings.batch_size or trainer.args.per_device_train_batch_size
    if settings.data is None:
        with located(recipe, "calibration"):
            return batches_of_trainer(trainer, samples=settings.rows, batch_size=size, seed=recipe.seed)
    with located(recipe, "calibration", "data"):
        rows = load_source(settings.data, settings.split or "train", _config(recipe, settings))
        rows = in_format(rows, _columns(recipe, rows.column_names), _FORMATS)
        chosen = choose_rows(rows, settings.rows, recipe.seed)
        longest = settings.max_length or getattr(trainer.args, "max_length", None)
        return batches_of_rows(chosen, tokenizer, batch_size=size, max_length=longest)


def _config(recipe: Recipe, settings: Calibration) -> str | None:
    return settings.config or (recipe.data.config if settings.data == recipe.data.train else None)


def _columns(recipe: Recipe, names: list[str]) -> Mapping[str, str] | None:
    """The recipe's mapping, where these rows are the same kind as the training's."""
    mapping = recipe.data.columns
    if mapping is not None:  # rewards compare with answers; statistics are of prompts
        mapping = {target: value for target, value in mapping.items() if target != "answer"}
    if mapping is None or not any(set(mapping) == set(wanted) for wanted in _FORMATS):
        return None
    needed = {
        column
        for value in mapping.values()
        for column in ([value] if value in names or "{" not in value else re.findall(r"{(\w+)}", value))
    }
    return mapping if needed <= set(names) else None


# -- the cache ------------------------------------------------------------------------------------------------------


def calibration_folder() -> Path:
    """`calibration` in the folder of `LLMREG_CACHE`, by default `~/.cache/llmreg`."""
    return cache_file().parent / "calibration"


def kept_statistics(folder: Path) -> list[Path]:
    """The files of the cache, the one written last first."""
    if not folder.is_dir():
        return []
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir() if _NAME.fullmatch(path.name)}
    return sorted(files, key=files.__getitem__, reverse=True)


def clear_statistics(folder: Path) -> tuple[int, int]:
    """Remove all statistics from the cache, and nothing else in the folder; (count, bytes) removed."""
    sizes = []
    for path in kept_statistics(folder):
        sizes.append(path.stat().st_size)
        path.unlink(missing_ok=True)
    return len(sizes), sum(sizes)


def _make_room(folder: Path, left: int) -> None:
    """Remove the oldest statistics beyond `left` bytes; the newest, which this run may have written, stay."""
    for number, path in enumerate(kept_statistics(folder)):
        left -= path.stat().st_size
        if number and left < 0:
            path.unlink(missing_ok=True)


def _base(recipe: Recipe, settings: Calibration, model: Any) -> str:
    """Everything besides data and settings that decides the sums.

    The seed is among it: it draws new heads and new embeddings. So is the budget, above which inputs are sketched.
    """
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    identity = identity_hash(model)
    kinds = sorted({str(parameter.dtype) for parameter in model.parameters() if not parameter.requires_grad})
    parts = (
        identity.source,
        identity.digest,
        f"{recipe.model.quantization} {' '.join(kinds)} {parameter.device.type}",
        f"{recipe.task} {getattr(model.config, '_attn_implementation', None)}",
        f"torch {torch.__version__} seed {recipe.seed} budget {settings.budget}",
    )
    return "|".join(parts)


def _fingerprint(batches: Iterable[Any]) -> str:
    """Of the tensors that the model is given, in order."""
    digest = fast_digest("batches")
    for number, batch in enumerate(batches):
        for name, value in sorted(batch.items()):
            label = f"{number} {name}"
            update(digest, label, value if isinstance(value, torch.Tensor) else repr(value))
    return digest.hexdigest()


# -- the report -----------------------------------------------------------------------------------------------------


def _in_short(settled: Plan, settings: Calibration, report: InitializationReport) -> dict[str, Any]:
    """For the run's report: what was read, what was gathered, what was chosen."""
    parts = report.calibration
    groups = [group for part in parts for group in part["groups"]]
    exact = sum(group["form"] == "exact" for group in groups)
    ranks = next(iter(report.ranks.values()))
    return {
        "data": settings.data or settled.recipe.data.train,
        "tokens": sum(part["tokens"] for part in parts),
        "batches": sum(part["batches"] for part in parts),
        "passes": max(part["passes"] for part in parts),
        "inputs": len(groups),
        "exact": exact,
        "sketched": len(groups) - exact,
        "reason": parts[0]["reason"],
        "cached": all(part["cached"] for part in parts),
        "seconds": report.seconds,
        "ranks": None if settled.ranks_known else ranks,
    }
