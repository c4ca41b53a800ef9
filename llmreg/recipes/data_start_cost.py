"""What a start from calibration data would cost, before anything is loaded: bytes, seconds, and how many inputs.

Which layers share an input is found by a forward on fake tensors. The decomposition of each input is run on made-up
statistics, scaled down where layers are wide, and its time and memory scaled up again.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..adapters.data_group import DataGroup, DataLayer
from ..calibration import InputStatistics
from ..calibration.budget import Plan, plan_unlimited, plan_within
from .memory_step import LiveBytes, materialize
from .schema import Calibration

__all__ = ["DataStartCost", "data_start_cost"]

#: Widest layer that is decomposed in full to be timed.
_WIDEST = 1024


@dataclass(frozen=True)
class DataStartCost:
    """Attributes:
    inputs: distinct layer inputs. reason: exact, sketched or several passes, in words.
    statistics: bytes of all sums. workspace: bytes beside them, of a forward or of the largest decomposition.
    seconds: of the decompositions. forward_seconds: of running the base over the data.
    """

    inputs: int
    reason: str
    statistics: int
    workspace: int
    seconds: float
    forward_seconds: float


def data_start_cost(
    model: nn.Module,
    config: Any,
    layers: Sequence[str],
    settings: Calibration,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    device: str,
) -> DataStartCost:
    """The cost for the base `model`, an `outline`.

    Args:
        config: a config that starts from data. layers: names of the layers it targets.
        batch_size: rows at a time. length: tokens of a row, at most.
        dtype: of the weights. device: "cpu" or "cuda", where all of it would run.

    Raises:
        RecipeError: the memory budget is too small.
    """
    groups, forward = _forward(model, layers, batch_size, length, dtype, device)
    shapes = {name: _shape(model.get_submodule(name)) for name in layers}
    plan, statistics = _plan(config, groups, {name: shape[1] for name, shape in shapes.items()}, settings)
    workspace, seconds = 0, 0.0
    kinds = Counter(tuple(sorted(shapes[name] for name in group)) for group in groups)
    for kind, number in kinds.items():
        needed, took = _decomposition(config, kind, plan.sketch_of(kind[0][1]), device)
        workspace, seconds = max(workspace, needed), seconds + number * took
    tokens = (settings.rows or 0) * length if settings.max_tokens is None else settings.max_tokens
    widths = [shapes[group[0]][1] for group in groups]
    sums = sum(width * (plan.sketch_of(width) or width) for width in widths)
    return DataStartCost(
        inputs=len(groups),
        reason=plan.reason,
        statistics=statistics,
        workspace=max(workspace, forward),
        seconds=seconds,
        forward_seconds=len(plan.passes) * _forward_seconds(model, sums, tokens, dtype, device),
    )


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    weight: Any = layer.weight
    height, width = weight.shape
    return (height, width) if isinstance(layer, nn.Linear) else (width, height)  # Conv1D keeps (in, out)


def _plan(config: Any, groups: list[list[str]], widths: dict[str, int], settings: Calibration) -> tuple[Plan, int]:
    """How the sums would be gathered, and their bytes."""
    limited = settings.budget is not None
    exact = settings.exact if limited or settings.exact is not None else settings.sketch is None
    plan = plan_within(
        settings.budget if settings.budget is not None else 1 << 62,
        groups,
        widths,
        config.need(),
        exact=exact,
        sketch=settings.sketch,
    )
    size = plan.one_pass_bytes
    return (plan if limited else plan_unlimited(widths, exact=settings.exact, sketch=settings.sketch)), size


# -- the forward ------------------------------------------------------------------------------------------------------


def _forward(
    model: nn.Module, layers: Sequence[str], rows: int, length: int, dtype: torch.dtype, device: str
) -> tuple[list[list[str]], int]:
    """The layers that share an input, and the peak bytes of a forward without gradients; each alone if it fails."""
    outline = copy.deepcopy(model).to(dtype).eval()
    seen: dict[int, tuple[Tensor, list[str]]] = {}

    def see(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)

        return hook

    try:
        with FakeTensorMode(), torch.no_grad():
            materialize(outline, device)
            with LiveBytes([*outline.parameters(), *outline.buffers()]) as memory:
                _run(outline, rows, length, device)
            hooks = [outline.get_submodule(name).register_forward_pre_hook(see(name)) for name in layers]
            with LiveBytes([*outline.parameters(), *outline.buffers()]):
                _run(outline, 1, 8, device)
            for hook in hooks:
                hook.remove()
    except Exception:  # whatever an architecture does that fake tensors cannot follow
        return [[name] for name in layers], 0
    reached = [names for _, names in seen.values()]
    missing = set(layers) - {name for names in reached for name in names}
    return [*reached, *([name] for name in layers if name in missing)], memory.peak


def _run(model: Any, rows: int, length: int, device: str) -> None:
    ids = torch.zeros((rows, length), dtype=torch.long, device=device)
    causal = {"logits_to_keep": 1, "use_cache": False} if hasattr(model, "lm_head") else {}
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    model(input_ids=ids, attention_mask=torch.ones_like(ids), **causal)


def _forward_seconds(model: nn.Module, sums: int, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Two operations for each token and weight, and each entry of the `sums`, at the speed of a product timed here."""
    side = 1024
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    (left @ right).sum().item()
    started = time.perf_counter()
    (left @ right).sum().item()
    speed = 2 * side**3 / (time.perf_counter() - started)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weights = sum(parameter.numel() for parameter in model.parameters())
    weights -= 0 if embedding is None else embedding.weight.numel()
    return 2 * tokens * (weights + sums) / speed


# -- the decomposition ------------------------------------------------------------------------------------------------


def _decomposition(
    config: Any, shapes: tuple[tuple[int, int], ...], sketch: int | None, device: str
) -> tuple[int, float]:
    """Peak bytes and seconds of the starts of layers of these `(out, in)` that share an input."""
    times = max(1.0, max(max(shape) for shape in shapes) / _WIDEST)
    small = [(max(1, round(height / times)), max(1, round(width / times))) for height, width in shapes]
    rank = max(1, min(config.r, *(min(shape) for shape in small)))
    part = InputStatistics(small[0][1], config.need(), sketch=sketch if sketch and sketch < small[0][1] else None)
    generator = torch.Generator().manual_seed(0)
    falling = torch.arange(1, part.dim + 1, dtype=torch.float32) ** -0.6
    part.add(torch.randn(2 * part.dim, part.dim, generator=generator) * falling)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in small]
    _starts(config, weights, part, rank, device)  # libraries load outside the measurement
    with LiveBytes(weights, real=True) as memory:
        _starts(config, weights, part, rank, device)
    started = time.perf_counter()
    _starts(config, weights, part, rank, device)
    copies = 4 * sum(height * width for height, width in shapes)
    return int(memory.peak * times**2) + copies, (time.perf_counter() - started) * times**3


def _made_up(name: str, weight: Tensor, rank: int) -> DataLayer:
    height, width = weight.shape
    return DataLayer(name, (height, width), rank, 1.0, lambda: weight, lambda: weight * 1.01)


def _starts(config: Any, weights: list[Tensor], part: InputStatistics, rank: int, device: str) -> None:
    layers = tuple(_made_up(str(number), weight, rank) for number, weight in enumerate(weights))
    group = DataGroup((part,) * config.candidates(), layers, device if device != "cpu" else None)
    for factors in config.starts(group, config.survey(group)):
        factors.A.sum().item()
