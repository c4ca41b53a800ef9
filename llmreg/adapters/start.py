"""Starting the factors of an adapter, layer by layer: from a sibling that already has them, or by decomposition.

Weights are read in groups of bounded size, so nothing the size of the model is ever allocated; layers of equal shape
are decomposed in batches, on a CPU one batch a thread. In a distributed run all ranks take the factors of the first.
Inside `use_starts` what was decomposed before is taken from disk, to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import WeightError
from ..initializers import Factors
from ..progress import track
from ..weights import check_finite, gathered, read_weight
from .config import AdditiveConfig
from .layer import layers_of
from .side_by_side import Map, side_by_side
from .start_cache import StartCache, current_starts
from .start_key import StartKey, start_keys

__all__ = ["broadcast_start", "decomposing_device", "is_distributed", "start_factors"]

#: Bytes of fp32 weights of equal shape that are in memory together, and that are decomposed as one batch. On a CPU
#: only small layers gain by a batch; the batches of a group go side by side.
_GROUP_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
_BATCH_BYTES = {"cuda": 1 << 30, "cpu": 4 << 20}


def start_factors(
    model: nn.Module, adapter_name: str, config: AdditiveConfig, configs: dict[str, Any] | None = None
) -> None:
    """Put every layer of `adapter_name` at the method's start, where the adapter adds exactly nothing.

    Args:
        model: the model that holds the injected layers.
        adapter_name: an additive adapter whose factors are unset.
        config: its config.
        configs: all adapters' configs by name; one with the same start settings, rank and scaling lends its frozen
            factors (TRL's reference copy costs no second decomposition, and asks for no data).

    A rank that the start chooses (`chooses_rank`) is recorded in the config's `rank_pattern`, by the layer's full name.
    Layers of the surrounding `use_starts` folder are not decomposed again; how many there were is logged.

    Raises:
        WeightError: NaN or Inf in a base weight (the layer is named), or a storage that cannot be read.
    """
    layers = [
        (name, module) for name, module in layers_of(model, adapter_name).items() if not _is_meta(module, adapter_name)
    ]
    siblings = _siblings(adapter_name, config, configs or {})
    missing = [
        (name, layer) for name, layer in layers if not _copy_from_sibling(name, layer, adapter_name, config, siblings)
    ]
    cache = current_starts()
    hits_before = 0 if cache is None else cache.hits
    with side_by_side() as run:
        for group in track(list(_groups(missing, adapter_name, config)), f"{config.method}: decomposing"):
            _start_group(group, adapter_name, config, cache, run)
    if cache is not None:
        cache.finish(cache.hits - hits_before, len(missing))


def _is_meta(layer: Any, adapter_name: str) -> bool:
    return layer.factors(adapter_name)["lora_A0"].is_meta


def _siblings(adapter_name: str, config: AdditiveConfig, configs: dict[str, Any]) -> dict[str, AdditiveConfig]:
    return {name: other for name, other in configs.items() if name != adapter_name and isinstance(other, type(config))}


def _copy_from_sibling(
    name: str, layer: Any, adapter_name: str, config: AdditiveConfig, siblings: dict[str, AdditiveConfig]
) -> bool:
    for sibling, other in siblings.items():
        same = layer.form(sibling) and other.start_settings(name) == config.start_settings(name)
        if same and not _is_meta(layer, sibling) and layer.scaling[sibling] == layer.scaling[adapter_name]:
            if config.chooses_rank(name):
                _take_rank(name, layer, adapter_name, config, layer.r[sibling])
            if layer.r[sibling] == layer.r[adapter_name]:
                layer.set_start(adapter_name, layer.start(sibling))
                if sibling in layer.vector_error:  # the sibling's vectors are rounded already
                    layer.vector_error[adapter_name] = layer.vector_error[sibling]
                return True
    return False


def _groups(
    layers: Iterable[tuple[str, Any]], adapter_name: str, config: AdditiveConfig
) -> Iterator[list[tuple[str, Any]]]:
    """Layers of equal shape, rank and settings together, up to `_GROUP_BYTES`; at least one."""
    by_shape: dict[tuple, list[tuple[str, Any]]] = {}
    for name, layer in layers:
        own = name if config.chooses_rank(name) else None  # its rank may be no other layer's
        settings = (layer.r[adapter_name], layer.scaling[adapter_name], config.start_settings(name), own)
        by_shape.setdefault((layer.out_features, layer.in_features, *settings), []).append((name, layer))
    for members in by_shape.values():
        yield from _chunks(members, _GROUP_BYTES)


def _batches(group: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """The layers of a group that are decomposed as one, up to `_BATCH_BYTES`; at least one."""
    return _chunks(group, _BATCH_BYTES)


def _chunks(layers: list[tuple[str, Any]], budgets: dict[str, int]) -> list[list[tuple[str, Any]]]:
    """Layers of one shape in chunks of at most the budget of the device that decomposes; at least one."""
    layer = layers[0][1]
    size = max(1, budgets[decomposing_device() or "cpu"] // (4 * layer.out_features * layer.in_features))
    return [layers[first : first + size] for first in range(0, len(layers), size)]


def _start_group(
    group: list[tuple[str, Any]], adapter_name: str, config: AdditiveConfig, cache: StartCache | None, run: Map
) -> None:
    """Start layers that are in memory together. Those of one batch are all taken from the cache, or none."""
    rank, scaling = group[0][1].r[adapter_name], group[0][1].scaling[adapter_name]
    batches = _batches(group)
    with torch.no_grad(), gathered([layer.get_base_layer() for _, layer in group]):
        keys = [_keys(batch, config, rank, scaling, cache) for batch in batches]
        found = [None if cache is None or key is None else cache.load(key) for key in keys]
        missing = [batch for batch, factors in zip(batches, found, strict=True) if factors is None]
        weights = [[_read(name, layer) for name, layer in batch] for batch in missing]

        def decompose(place: int) -> list[Factors]:
            return _decompose(missing[place], weights[place], config, rank, scaling)

        made = iter(run(decompose, range(len(missing))))
    for batch, key, cached in zip(batches, keys, found, strict=True):
        factors = next(made) if cached is None else cached
        if cache is not None and key is not None and cached is None:
            cache.store(key, factors)
        for (name, layer), start in zip(batch, factors, strict=True):
            if config.chooses_rank(name):
                _take_rank(name, layer, adapter_name, config, start.A.shape[-2])
            layer.set_start(adapter_name, start)
            broadcast_start(layer, adapter_name)


def _take_rank(name: str, layer: Any, adapter_name: str, config: AdditiveConfig, rank: int) -> None:
    """Give a layer the rank that its start chose, at the scaling that it has."""
    scaling = layer.scaling[adapter_name]
    alpha = scaling * (rank**0.5 if config.use_rslora else rank)
    config.accept_rank(name, (layer.out_features, layer.in_features), rank, alpha)
    layer.lora_alpha[adapter_name] = alpha
    layer.set_rank(adapter_name, rank)


def _keys(
    batch: list[tuple[str, Any]], config: AdditiveConfig, rank: int, scaling: float, cache: StartCache | None
) -> list[StartKey] | None:
    if cache is None:
        return None
    bases = [layer.get_base_layer() for _, layer in batch]
    return start_keys(bases, config, batch[0][0], rank, scaling, decomposing_device())


def _decompose(
    batch: list[tuple[str, Any]], weights: list[Tensor], config: AdditiveConfig, rank: int, scaling: float
) -> list[Factors]:
    """The start of each layer of `batch` from its weight, made at once."""
    try:
        W = weights[0] if len(weights) == 1 else torch.stack(weights)
        factors = config.start(W, rank, scaling, batch[0][0])
    except WeightError:  # most often NaN or Inf: say in which layer
        for (name, _), weight in zip(batch, weights, strict=True):
            check_finite(weight, name)
        raise
    if len(weights) == 1:
        return [factors]
    return [Factors(*parts) for parts in zip(factors.A, factors.B, factors.singular_values, strict=True)]


def _read(name: str, layer: Any) -> Tensor:
    """The layer's base weight in fp32, on a GPU where there is one."""
    return read_weight(layer.get_base_layer(), name=name, device=decomposing_device())


def decomposing_device() -> str | None:
    """Where weights are decomposed; None: where they are."""
    return "cuda" if torch.cuda.is_available() else None


def broadcast_start(layer: Any, adapter_name: str) -> None:
    """Every rank takes rank 0's factors: equal to the last bit, whatever each rank's hardware rounds to."""
    if not is_distributed():
        return
    start = layer.start(adapter_name)
    for value in filter(Tensor.numel, (start.A, start.B, start.singular_values)):
        dist.broadcast(value.data, src=0)
    layer.set_start(adapter_name, start)


def is_distributed() -> bool:
    """Whether several processes run this."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
