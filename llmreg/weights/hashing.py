"""Hashes of what a base model stores (law 4): the stored bytes of chosen layers.

The same layer hashes the same on every device, before and after a forward, and however packed
4-bit bytes are typed; another dtype, quantisation, shape or value hashes differently. Everything is
streamed in chunks: no copy of a layer is made, except where a DTensor has to be gathered.
The other hash of law 4, which checkpoint a model comes from, is in `identity.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from llmreg.errors import WeightError
from llmreg.weights.quantized import quantized_parts
from llmreg.weights.read import whole
from llmreg.weights.storage import is_linear4bit, is_linear8bit, storage_of

__all__ = ["bytes_hash", "module_bytes_hash"]

_CHUNK = 1 << 24  # bytes brought to the CPU at a time
_FORMAT = "llmreg-bytes-1"


def bytes_hash(model: nn.Module, names: Iterable[str]) -> str:
    """sha256 (hex) over the stored weights of the layers called `names`, in any order.

    Args:
        model: bare or wrapped by PEFT; wrapping does not change the hash.
        names: qualified module names, with or without PEFT's `base_model.model.` and `.base_layer`.

    Raises:
        WeightError: no names, a name the model does not have, or a layer without data.
        UnsupportedError: a layer stored in a way this room does not know.
    """
    wanted = sorted({base_name(name) for name in names})
    if not wanted:
        raise WeightError("bytes_hash needs the name of at least one layer")
    digest = hashlib.sha256(_FORMAT.encode())
    for name in wanted:
        digest.update(f"\n{name}={module_bytes_hash(_submodule(model, name), name=name)}".encode())
    return digest.hexdigest()


def module_bytes_hash(module: nn.Module, *, name: str = "") -> str:
    """sha256 (hex) over the stored weight of one base layer (of an adapted layer: of its base layer).

    A float weight: its bytes in stored orientation. 4-bit: codes, scales (nested ones as stored),
    tables, block size, types. int8: codes and row scales. Always shape and dtype. Not the bias.

    Raises:
        WeightError: no data (meta, not quantised yet, scales lost). UnsupportedError: unknown storage.
    """
    module = base_layer(module)
    storage = storage_of(module)
    if storage.kind == "meta":
        raise WeightError(f"layer {name!r}: a weight on the meta device has no bytes to hash; load the model first")
    digest = hashlib.sha256(f"{_FORMAT}|{storage.kind}|{storage.shape}|{storage.transposed}".encode())
    if storage.kind == "float":
        update(digest, "weight", whole(module.weight))  # type: ignore[arg-type]
    else:
        for label, part in quantized_parts(module, storage, name):
            update(digest, label, part)
    return digest.hexdigest()


def memory_digest(model: nn.Module) -> str:
    """sha256 (hex) over every parameter of the base model as it is in memory; adapters are left out.

    Raises:
        WeightError: a parameter is on the meta device.
    """
    digest = hashlib.sha256(f"{_FORMAT}|memory".encode())
    for name, module in sorted(base_modules(unwrapped(model)), key=lambda pair: pair[0]):
        for key, parameter in sorted(module._parameters.items()):
            if parameter is None:
                continue
            if parameter.is_meta:
                raise WeightError(f"{name}.{key} is on the meta device and has no bytes to hash; load the model")
            if key == "weight" and (is_linear4bit(module) or is_linear8bit(module)):
                update(digest, f"{name}.{key}", module_bytes_hash(module, name=name))
            else:
                update(digest, f"{name}.{key}", whole(parameter))
    return digest.hexdigest()


def update(digest: Any, label: str, part: torch.Tensor | str) -> None:
    """Feed one labelled text or tensor (dtype, shape, row-major bytes) to a hash, in chunks."""
    if isinstance(part, str):
        digest.update(f"|{label}={len(part)}:{part}".encode())
        return
    digest.update(f"|{label}={part.dtype}{tuple(part.shape)}:".encode())
    for piece in _row_pieces(part):
        # As bytes, because numpy has no bfloat16.
        digest.update(piece.reshape(-1).view(torch.uint8).cpu().numpy().data)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer under any number of adapter wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def base_name(name: str) -> str:
    """A layer's name in the bare model, from its name in a PEFT-wrapped one."""
    name = name.removeprefix("base_model.model.")
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that PEFT wraps (its layers may still be adapted ones), or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    if not callable(get_base_model):
        return model
    inner: Any = getattr(model.base_model, "model", None)
    return inner if isinstance(inner, nn.Module) else get_base_model()


def base_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules of the base model with their bare names, stepping over what adapters added."""
    for wrapper in ("base_layer", "original_module", "token_adapter"):  # LoRA, modules_to_save, trainable tokens
        inner = module._modules.get(wrapper)
        if inner is not None:
            yield from base_modules(inner, prefix)
            return
    yield prefix, module
    for name, child in module.named_children():
        yield from base_modules(child, f"{prefix}.{name}" if prefix else name)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return unwrapped(model).get_submodule(name)
    except AttributeError as error:
        raise WeightError(f"the model has no layer {name!r}") from error


def _row_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Contiguous pieces of about `_CHUNK` bytes in row-major order (copies only of what is strided)."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        tensor = tensor.reshape(-1)
    row = math.prod(tensor.shape[1:]) * tensor.element_size()
    for piece in tensor.reshape(1).split(1) if tensor.dim() == 0 else tensor.split(max(1, _CHUNK // row)):
        yield piece.contiguous()
