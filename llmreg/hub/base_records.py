"""Which base an adapter lies on: the record that its sidecar keeps, taken from a model that is wrapped or bare."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..adapters.bone_layer import BoneLinear
from ..adapters.layer import AdditiveLayer
from ..errors import AdapterFileError, WeightError
from ..weights import bytes_hash, identity_hash, is_sharded, storage_of
from .sidecar import BaseRecord

__all__ = ["bare_record", "base_record", "remember_base"]

_PREFIX = "base_model.model."


def base_record(model: PeftModel, layers: Iterable[str]) -> BaseRecord:
    """Identity and stored bytes of a wrapped model's base; computed once a model (the base never changes).

    Args:
        model: wrapped by PEFT.
        layers: names of the targeted layers.
    """
    return _record(model.base_model, tuple(sorted(set(layers))))


def remember_base(tuner: Any) -> None:
    """Record the base under every adapter before a merge, which even undone leaves its weights rounded."""
    for name in tuner.peft_config:
        layers = [key for key, module in tuner.model.named_modules() if _carries(module, name)]
        if layers:
            _record(tuner, tuple(sorted(f"{_PREFIX}{key}" for key in layers)))


def _carries(module: Any, adapter: str) -> bool:
    if isinstance(module, AdditiveLayer):
        return module.form(adapter) is not None
    return isinstance(module, BoneLinear) and adapter in module.bone_block


def _record(tuner: Any, targets: tuple[str, ...]) -> BaseRecord:
    cache: dict[tuple[str, ...], BaseRecord] = tuner.__dict__.setdefault("_llmreg_base_records", {})
    if targets not in cache:
        layers = [name.removeprefix(_PREFIX) for name in targets]
        modules = _layers(tuner.model, layers)
        storage = _storage_name(modules.values())
        if any(getattr(module, "merged", False) for module in modules.values()):
            return BaseRecord(None, None, None, None, None, storage)
        identity = identity_hash(tuner.model)
        cache[targets] = BaseRecord(
            digest=identity.digest,
            source=identity.source,
            name=identity.name,
            revision=identity.revision,
            stored_bytes=_stored_bytes(tuner.model, layers),
            storage=storage,
        )
    return cache[targets]


def _stored_bytes(model: Any, layers: list[str]) -> str | None:
    """Digest of the layers as stored; None where they are not whole here (sharded, or repacked 4-bit weights)."""
    if any(is_sharded(_base_layer(model.get_submodule(name))) for name in layers):
        return None
    try:
        return bytes_hash(model, layers)
    except WeightError:
        return None


def _layers(model: Any, names: Iterable[str]) -> dict[str, Any]:
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise AdapterFileError(f"The adapter has factors for layer {missing[0]!r}, which this base model lacks.")
    return {name: modules[name] for name in names}


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _storage_name(modules: Any) -> str:
    """How the layers are stored, e.g. "nf4" or "bfloat16"; asks no other rank, since only one saves."""
    names = set()
    for module in modules:
        base = _base_layer(module)
        kind = "float" if is_sharded(base) else storage_of(base).kind
        names.add(str(base.weight.dtype).removeprefix("torch.") if kind == "float" else kind)
    return "+".join(sorted(names))


def bare_record(model: Any, layers: list[str], source: str | None, *, hashed: bool) -> BaseRecord:
    """The record of a model that PEFT has not wrapped; its bytes `hashed` also where its `source` is another."""
    storage = _storage_name(_layers(model, layers).values())
    identity = identity_hash(model)
    stored_bytes = bytes_hash(model, layers) if hashed or (source and identity.source != source) else None
    return BaseRecord(identity.digest, identity.source, identity.name, identity.revision, stored_bytes, storage)
