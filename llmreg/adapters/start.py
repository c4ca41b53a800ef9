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
    """Set `A = A0`, `B = B0` of every layer of `adapter_name` to the method's start.

    Args:
        model: the model that holds the injected layers.
        adapter_name: an additive adapter whose factors are unset.
        config: its config.
        configs: all adapters' configs by name; one with the same start settings, rank and scaling lends its frozen
            factors (TRL's reference copy costs no second decomposition, and asks for no data).

    Layers of the surrounding `use_starts` folder are not decomposed again; how many there were is logged.

    Raises:
        WeightError: NaN or Inf in a base weight (the layer is named), or a storage that cannot be read.
    """
    layers = [(name, module) for name, module in _layers(model, adapter_name) if not _is_meta(module, adapter_name)]
    siblings = _siblings(adapter_name, config, configs or {})
    missing = [(name, layer) for name, layer in layers if not _copy_from_sibling(layer, adapter_name, siblings)]
    cache = current_starts()
    hits_before = 0 if cache is None else cache.hits
    for group in track(list(_groups(missing, adapter_name)), f"{config.method}: decomposing"):
        _start_group(group, adapter_name, config, cache)
    if cache is not None:
        cache.finish(cache.hits - hits_before, len(missing))


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, AdditiveLayer) and adapter_name in module.lora_A0:
            yield name, module


def _is_meta(layer: Any, adapter_name: str) -> bool:
    return layer.lora_A[adapter_name].weight.is_meta


def _siblings(adapter_name: str, config: AdditiveConfig, configs: dict[str, Any]) -> list[str]:
    return [
        name
        for name, other in configs.items()
        if name != adapter_name
        and isinstance(other, AdditiveConfig)
        and other.start_settings() == config.start_settings()
    ]


def _copy_from_sibling(layer: Any, adapter_name: str, siblings: list[str]) -> bool:
    for sibling in siblings:
        same = sibling in layer.lora_A0 and all(
            getattr(layer, key)[sibling] == getattr(layer, key)[adapter_name] for key in ("r", "scaling")
        )
        if same and not _is_meta(layer, sibling):
            layer.set_factors(adapter_name, layer.lora_A0[sibling].weight, layer.lora_B0[sibling].weight)
            return True
    return False


def _groups(layers: Iterable[tuple[str, Any]], adapter_name: str) -> Iterator[list[tuple[str, Any]]]:
    """Layers of equal shape, rank and scaling together, up to `_BATCH_BYTES`; at least one."""
    budget = _BATCH_BYTES["cuda" if torch.cuda.is_available() else "cpu"]
    by_shape: dict[tuple, list[tuple[str, Any]]] = {}
    for name, layer in layers:
        key = (layer.out_features, layer.in_features, layer.r[adapter_name], layer.scaling[adapter_name])
        by_shape.setdefault(key, []).append((name, layer))
    for (out_features, in_features, _, _), members in by_shape.items():
        size = max(1, budget // (4 * out_features * in_features))
        yield from (members[first : first + size] for first in range(0, len(members), size))


def _start_group(
    group: list[tuple[str, Any]], adapter_name: str, config: AdditiveConfig, cache: StartCache | None
) -> None:
    """Start layers that are decomposed together, all from the cache or none."""
    rank, scaling = group[0][1].r[adapter_name], group[0][1].scaling[adapter_name]
    bases = [layer.get_base_layer() for _, layer in group]
    with torch.no_grad(), gathered(bases):
        keys = None if cache is None else start_keys(bases, config, rank, scaling, _device())
        cached = None if cache is None or keys is None else cache.load(keys)
        factors = _decompose(group, config, rank, scaling) if cached is None else cached
    if cache is not None and keys is not None and cached is None:
        cache.store(keys, factors)
    for (_, layer), start in zip(group, factors, strict=True):
        layer.set_factors(adapter_name, start.A, start.B)
        _broadcast(layer, adapter_name)


def _decompose(group: list[tuple[str, Any]], config: AdditiveConfig, rank: int, scaling: float) -> list[Factors]:
    """The start of each layer of `group`, made in one batch."""
    weights = [_read(name, layer) for name, layer in group]
    try:
        factors = config.start(weights[0] if len(weights) == 1 else torch.stack(weights), rank, scaling)
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
    for name in ("lora_A0", "lora_B0"):
        dist.broadcast(getattr(layer, name)[adapter_name].weight.data, src=0)
    layer.set_factors(adapter_name, layer.lora_A0[adapter_name].weight, layer.lora_B0[adapter_name].weight)
