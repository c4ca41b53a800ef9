"""Read one base weight as a float (out, in) matrix, from wherever it is.

Nothing here writes to a module: bytes, scales and the next forward are the same before and after.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmreg.errors import WeightError
from llmreg.weights.quantized import dequantize_module
from llmreg.weights.storage import FLOAT_DTYPES, Storage, is_dtensor, storage_of

if TYPE_CHECKING:
    from llmreg.weights.source import SafetensorsSource

__all__ = ["read_weight"]


def read_weight(
    module: nn.Module,
    *,
    name: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    source: SafetensorsSource | None = None,
) -> torch.Tensor:
    """The logical (out, in) weight of a base layer, detached, in `dtype`.

    **Treat the result as read-only**: where the layer already holds `dtype` on `device` it shares the
    layer's memory (for Conv1D as a transposed, non-contiguous view).

    Args:
        module: the base layer itself (of an adapted layer: its `base_layer`).
        name: its qualified name, for messages and to find its tensor in `source`.
        dtype: of the result. A quantised weight is first dequantised exactly as bitsandbytes does.
        device: of the result; default: where the weight is (a meta weight: the CPU).
        source: checkpoint to read from where the layer is on the meta device. The tensor is rounded to
            the layer's own dtype first, as loading would.

    A DTensor is gathered by `full_tensor()`, a collective: every rank must call.

    Raises:
        UnsupportedError: a storage this room does not know, named.
        WeightError: no data (meta without source, not quantised yet, int8 scales lost).
    """
    storage = storage_of(module)
    if storage.kind == "meta":
        W = _read_meta(module, storage, name, source)
    elif storage.kind == "float":
        W = whole(module.weight)  # type: ignore[arg-type]
    else:
        W = dequantize_module(module, storage, name)
    if storage.transposed:
        W = W.t()
    return W.detach().to(device=device, dtype=dtype)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """The detached plain tensor behind a parameter; a DTensor is gathered."""
    if is_dtensor(weight):
        return weight.detach().full_tensor()  # type: ignore[attr-defined]
    weight = weight.detach()
    return weight.as_subclass(torch.Tensor)


def _read_meta(module: nn.Module, storage: Storage, name: str, source: SafetensorsSource | None) -> torch.Tensor:
    """The stored (not yet transposed) tensor of a layer without data, rounded to the layer's dtype."""
    if storage.quantized:
        raise WeightError(
            f"layer {name!r}: a quantised layer on the meta device; it can be read once the model is loaded"
        )
    stored = _offloaded(module)
    if stored is None:
        if source is None:
            raise WeightError(
                f"layer {name!r}: its weight is on the meta device and holds no data; load the model first, "
                "or give the checkpoint as source=SafetensorsSource(folder)"
            )
        stored = source.read_weight_of(name)
    expected = (storage.shape[1], storage.shape[0]) if storage.transposed else storage.shape
    if tuple(stored.shape) != expected or stored.dtype not in FLOAT_DTYPES:
        raise WeightError(
            f"layer {name!r}: the checkpoint holds {tuple(stored.shape)} {stored.dtype}, "
            f"the model expects {expected} in a float dtype; is this the model's own checkpoint?"
        )
    return stored.to(storage.dtype)


def _offloaded(module: nn.Module) -> torch.Tensor | None:
    """The weight that accelerate keeps on the CPU or on disk for an offloaded layer, if it does."""
    hook: Any = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", [hook]):
        weights_map = getattr(candidate, "weights_map", None)
        if weights_map is not None:
            with contextlib.suppress(KeyError):
                return weights_map["weight"]
    return None
