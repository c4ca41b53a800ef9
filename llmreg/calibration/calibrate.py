"""One pass over the data: run the model, sum its layers' inputs, report.

statistics = calibrate(model, loader, layers, Need(sample_scale="signed_max"))
C = statistics["model.layers.0.self_attn.q_proj"].second_moment()
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from llmreg.calibration.cache import CalibrationCache
from llmreg.calibration.distributed import everyones
from llmreg.calibration.passes import Forward, Passes, StoppingRule
from llmreg.calibration.results import Statistics
from llmreg.calibration.statistics import Need
from llmreg.errors import LlmregWarning, RecipeError

__all__ = ["calibrate"]

logger = logging.getLogger("llmreg")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Iterable[str],
    need: Need | None = None,
    *,
    memory_budget: int | None = None,
    exact: bool | None = None,
    sketch: int | None = None,
    max_tokens: int | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    share_inputs: bool = True,
    unreached: Literal["raise", "report"] = "raise",
    cache: CalibrationCache | None = None,
    distributed: bool = False,
    until: StoppingRule | None = None,
) -> Statistics:
    """Statistics of the inputs of `layers` while `model` runs over `batches`, in evaluation mode without gradients.

    Which tokens count is read from each batch (see `tokens`): `attention_mask`, `position_ids` of packed rows, and
    `labels` if `need` says so. Batches may be of any size; padding changes nothing.

    Args:
        batches: mappings as the model takes them, tensors, or tuples; any iterable.
        layers: qualified names of linear layers in `model`, however their weights are stored.
        need: what the method asks for; by default second moments alone.
        memory_budget: bytes that the sums may take; see `budget.plan_within` for what follows. It may cost a
            forward over the first batch, to learn which layers share an input, and several passes, for which
            `batches` must be iterable anew (a list, a DataLoader) and is read under the same random state each time.
        exact: True: never sketch; False: always; None: as `memory_budget` and `sketch` say.
        sketch: columns of a sketch; without a budget it asks for sketches. Its error is that of the best
            approximation of about half that rank.
        max_tokens: stop once so many tokens are counted (in each process). Of the last batch the first ones in
            row-major order count, so that it is exactly this number; unaligned inputs take that batch whole.
        forward: `forward(model, batch)` in place of `forward.run_batch`.
        seed: of the sketch's test matrix, drawn from a generator of its own.
        share_inputs: sum an input once for all layers that are given the same tensor.
        unreached: what to do about a layer that saw no token. An expert whose sibling (the same name but for one
            number) was sent some of the tokens is always only reported.
        cache: read the statistics from disk, or leave them there.
        distributed: every process of the default group calls this with its share of the batches and gets the
            sums of all; the first one writes to the cache, which counts as there only if all of them see it.
        until: asked after every batch with the sums so far (by layer); True ends the pass before its data does. In a
            distributed run each process asks about its own sums.

    Raises:
        RecipeError: no batches, no counted token, an unknown or unreached layer, a budget that is too small (names the
            minimum), several passes over what can be read once, arguments that contradict each other.
        WeightError: an input is not finite; names the layer.
        UnsupportedError: layers that shared an input stop doing so.
    """
    need = need or Need()
    modules = _modules(model, layers)
    _check_arguments(memory_budget, exact, sketch, max_tokens)
    settings = {
        "need": asdict(need),
        "layers": sorted(modules),
        "exact": exact,
        "sketch": sketch,
        "limited": memory_budget is not None,
        "max_tokens": max_tokens,
        "seed": seed,
        "share_inputs": share_inputs,
        **({} if until is None else {"until": until.key}),
        "processes": dist.get_world_size() if distributed and max_tokens is not None else 1,
    }
    if cache is not None:
        found = _cached(cache, settings, memory_budget, distributed)
        if found is not None:
            found.check(model)
            return found
    task = Passes(model, batches, modules, need, max_tokens, forward, seed, share_inputs, until)
    statistics = _together(lambda: task.run(memory_budget, exact, sketch), distributed)
    _check_reached(statistics, unreached)
    if cache is not None and (not distributed or dist.get_rank() == 0):
        cache.store(statistics, settings)
    if cache is not None and distributed:
        everyones(None)  # the others find the file from here on
    return statistics


def _together(run: Callable[[], Statistics], distributed: bool) -> Statistics:
    """With other processes: an error of one is an error of all, before any waits for the sums of another."""
    if not distributed:
        return run()
    statistics, error = None, None
    try:
        statistics = run()
    except Exception as caught:
        error = caught
    failures = everyones(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RecipeError(f"calibration failed in process {rank}: {failure}")
    assert statistics is not None
    return statistics.all_reduce()


def _cached(
    cache: CalibrationCache, settings: dict[str, Any], budget: int | None, distributed: bool
) -> Statistics | None:
    found = cache.load(settings)
    if found is not None and budget is not None and found.bytes > budget:
        found = None
    if distributed and not all(everyones(found is not None)):
        found = None
    if found is not None:
        logger.info("Calibration statistics of %d layers from the cache", len(found))
    return found


def _modules(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))
    chosen = {}
    for name in layers:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"the model has no layer {name!r} to calibrate{hint}")
        chosen[name] = known[name]
    if not chosen:
        raise RecipeError("calibration needs the name of at least one layer")
    return chosen


def _check_arguments(budget: int | None, exact: bool | None, sketch: int | None, max_tokens: int | None) -> None:
    for name, value in (("memory_budget", budget), ("sketch", sketch), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value}; give a positive number, or None")
    if exact is True and sketch is not None:
        raise RecipeError(f"exact=True and sketch={sketch} contradict each other; give one of them")


def _check_reached(statistics: Statistics, unreached: str) -> None:
    report = statistics.report
    if report.batches == 0:
        raise RecipeError("the calibration data is empty: there was not one batch")
    if report.tokens == 0:
        raise RecipeError(
            "the calibration data has no token that counts: the attention masks (or the labels, all -100) leave out "
            "every one"
        )
    experts = {pattern for name in report.unaligned for pattern in _patterns(name)}
    missing = [name for name in report.unreached if not experts & _patterns(name)]
    if missing and unreached == "raise":
        shown = ", ".join(repr(name) for name in missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise RecipeError(
            f"{len(missing)} of {len(missing) + len(statistics)} layers were never reached on the calibration data: "
            f"{shown}; leave them out, give data that reaches them, or calibrate with unreached='report'"
        )
    if report.masks_missed:
        warnings.warn(
            f"{len(report.masks_missed)} layers, such as {report.masks_missed[0]!r}, get tokens in an order of their "
            "own, so that padding and masked tokens that were sent to them count; use batches without padding",
            LlmregWarning,
            stacklevel=3,
        )


def _patterns(name: str) -> set[str]:
    """The name with each of its numbers left open in turn."""
    parts = name.split(".")
    return {".".join((*parts[:i], "*", *parts[i + 1 :])) for i, part in enumerate(parts) if part.isdigit()}
