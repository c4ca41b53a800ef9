"""Starting the factors of an adapter, layer by layer: from a sibling that already has them, or by decomposition.

Weights are read one layer at a time (small ones, and on a GPU, a bounded batch of equal shapes), so nothing the size
of the model is ever allocated. In a distributed run all ranks take the factors of the first. Inside `use_starts`
what was decomposed before is taken from disk, to the same bits.
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
from .layer import AdditiveLayer
from .start_cache import StartCache, current_starts
from .start_key import start_keys

__all__ = ["start_factors"]

#: Bytes of fp32 weights of equal shape that are decomposed together. On a CPU only small layers gain by it.
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
    layers = [(name, module) for name, module in _layers(model, adapter_name) if not _is_meta(module, adapter_name)]
    siblings = _siblings(adapter_name, config, configs or {})
    missing = [
        (name, layer) for name, layer in layers if not _copy_from_sibling(name, layer, adapter_name, config, siblings)
    ]
    cache = current_starts()
    hits_before = 0 if cache is None else cache.hits
    for group in track(list(_groups(missing, adapter_name, config)), f"{config.method}: decomposing"):
        _start_group(group, adapter_name, config, cache)
    if cache is not None:
        cache.finish(cache.hits - hits_before, len(missing))


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, AdditiveLayer) and module.form(adapter_name):
            yield name, module


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
                return True
    return False


def _groups(
    layers: Iterable[tuple[str, Any]], adapter_name: str, config: AdditiveConfig
) -> Iterator[list[tuple[str, Any]]]:
    """Layers of equal shape, rank and settings together, up to `_BATCH_BYTES`; at least one."""
    budget = _BATCH_BYTES["cuda" if torch.cuda.is_available() else "cpu"]
    by_shape: dict[tuple, list[tuple[str, Any]]] = {}
    for name, layer in layers:
        own = name if config.chooses_rank(name) else None  # its rank may be no other layer's
        settings = (layer.r[adapter_name], layer.scaling[adapter_name], config.start_settings(name), own)
        by_shape.setdefault((layer.out_features, layer.in_features, *settings), []).append((name, layer))
    for (out_features, in_features, *_), members in by_shape.items():
        size = max(1, budget // (4 * out_features * in_features))
        yield from (members[first : first + size] for first in range(0, len(members), size))


def _start_group(
    group: list[tuple[str, Any]], adapter_name: str, config: AdditiveConfig, cache: StartCache | None
) -> None:
    """Start layers that are decomposed together, all from the cache or none."""
    first, layer = group[0]
    rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    bases = [layer.get_base_layer() for _, layer in group]
    with torch.no_grad(), gathered(bases):
        keys = None if cache is None else start_keys(bases, config, first, rank, scaling, _device())
        cached = None if cache is None or keys is None else cache.load(keys)
        factors = _decompose(group, config, rank, scaling) if cached is None else cached
    if cache is not None and keys is not None and cached is None:
        cache.store(keys, factors)
    for (name, layer), start in zip(group, factors, strict=True):
        if config.chooses_rank(name):
            _take_rank(name, layer, adapter_name, config, start.A.shape[-2])
        layer.set_start(adapter_name, start)
        _broadcast(layer, adapter_name)


def _take_rank(name: str, layer: Any, adapter_name: str, config: AdditiveConfig, rank: int) -> None:
    """Give a layer the rank that its start chose, at the scaling that it has."""
    scaling = layer.scaling[adapter_name]
    alpha = scaling * (rank**0.5 if config.use_rslora else rank)
    config.accept_rank(name, (layer.out_features, layer.in_features), rank, alpha)
    layer.lora_alpha[adapter_name] = alpha
    layer.set_rank(adapter_name, rank)


def _decompose(group: list[tuple[str, Any]], config: AdditiveConfig, rank: int, scaling: float) -> list[Factors]:
    """The start of each layer of `group`, made in one batch."""
    weights = [_read(name, layer) for name, layer in group]
    try:
        W = weights[0] if len(weights) == 1 else torch.stack(weights)
        factors = config.start(W, rank, scaling, group[0][0])
    except WeightError:  # most often NaN or Inf: say in which layer
        for (name, _), weight in zip(group, weights, strict=True):
            check_finite(weight, name)
        raise
    if len(weights) == 1:
        return [factors]
    return [Factors(*parts) for parts in zip(factors.A, factors.B, factors.singular_values, strict=True)]


def _read(name: str, layer: Any) -> Tensor:
    """The layer's base weight in fp32, on a GPU where there is one."""
    return read_weight(layer.get_base_layer(), name=name, device=_device())


def _device() -> str | None:
    """Where weights are decomposed; None: where they are."""
    return "cuda" if torch.cuda.is_available() else None


def _broadcast(layer: Any, adapter_name: str) -> None:
    """Every rank takes rank 0's factors: equal to the last bit, whatever each rank's hardware rounds to."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    start = layer.start(adapter_name)
    for value in filter(Tensor.numel, (start.A, start.B, start.singular_values)):
        dist.broadcast(value.data, src=0)
    layer.set_start(adapter_name, start)
