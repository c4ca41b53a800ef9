"""How a base weight is stored: float, bitsandbytes NF4/FP4/int8, or not in memory at all.

`storage_of(module)` answers without touching the weight's data and without importing bitsandbytes;
what it does not know it refuses by name. Every other file of this room starts from its answer.
Notation: `W` is always the logical (out, in) matrix of `y = x Wᵀ`, however the module keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llmreg.errors import UnsupportedError

__all__ = ["Storage", "is_supported", "storage_of"]

Kind = Literal["float", "nf4", "fp4", "int8", "meta"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_READABLE = (
    "readable are torch.nn.Linear and transformers' Conv1D in float32, bfloat16, float16 or float64, and "
    "bitsandbytes' Linear4bit and Linear8bitLt; exclude this layer, or load the model in one of these"
)


@dataclass(frozen=True)
class Storage:
    """Where and how one base weight is kept.

    Attributes:
        kind: `float`, `nf4`, `fp4`, `int8`, or `meta` (no data in memory, whatever the class).
        shape: logical (out, in).
        dtype: the stored dtype of a float weight (of a meta one: the dtype it will have); for a
            quantised weight the dtype its layer computes in, never that of the packed bytes.
        transposed: the module keeps (in, out), as transformers' Conv1D does.
        quantized: codes and scales are stored. False on a bitsandbytes layer means that it has not
            been quantised *yet*; such a layer cannot be read.
    """

    kind: Kind
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    quantized: bool


def storage_of(module: nn.Module) -> Storage:
    """The `Storage` of a base layer (for an adapted layer: of its `base_layer`).

    Raises:
        UnsupportedError: naming the module's class and storage, for anything this room cannot read.
    """
    if is_linear4bit(module):
        return _storage_4bit(module)
    if is_linear8bit(module):
        return _storage_8bit(module)
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise UnsupportedError(f"{describe(module)} is an adapted layer: read its base_layer instead")
    transposed = is_conv1d(module)
    if not transposed and not isinstance(module, nn.Linear):
        raise UnsupportedError(f"cannot read the weight of {describe(module)}: {_READABLE}")
    weight = getattr(module, "weight", None)
    _refuse_unreadable(module, weight)
    assert isinstance(weight, torch.Tensor)
    shape = tuple(weight.shape)
    return Storage(
        kind="meta" if weight.is_meta else "float",
        shape=(shape[1], shape[0]) if transposed else (shape[0], shape[1]),
        dtype=weight.dtype,
        transposed=transposed,
        quantized=False,
    )


def is_supported(module: nn.Module) -> bool:
    """Whether `storage_of` knows this layer. It may still lack its data (meta, not quantised yet)."""
    try:
        storage_of(module)
    except UnsupportedError:
        return False
    return True


def is_linear4bit(module: nn.Module) -> bool:
    return _has_base(module, "bitsandbytes", "Linear4bit")


def is_linear8bit(module: nn.Module) -> bool:
    return _has_base(module, "bitsandbytes", "Linear8bitLt")


def is_conv1d(module: nn.Module) -> bool:
    return _has_base(module, "transformers", "Conv1D")


def is_dtensor(weight: Any) -> bool:
    return _has_base(weight, "torch.distributed", "DTensor")


def describe(module: nn.Module) -> str:
    """`package.Class (weight: Type, dtype)`, for error messages."""
    cls = type(module)
    text = f"{cls.__module__}.{cls.__name__}"
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"{text} (weight: {type(weight).__name__}, {dtype}, {_shape_text(weight)})"
    packed = [key for key in ("qweight", "W_q", "codes", "weight_packed") if hasattr(module, key)]
    return f"{text} (packed as {', '.join(packed)})" if packed else text


def quant_state_4bit(module: nn.Module) -> Any:
    """The live `QuantState` of a Linear4bit, or None where it has not been quantised yet.

    FSDP and parameter casts drop the attribute from the weight; the layer keeps a second reference.
    """
    state = getattr(module.weight, "quant_state", None)
    return state if state is not None else getattr(module, "quant_state", None)


def _has_base(thing: Any, package: str, name: str) -> bool:
    """Class test by name, so that no optional package is imported only to say no."""
    return any(
        base.__name__ == name and (base.__module__ + ".").startswith(package + ".") for base in type(thing).__mro__
    )


def _storage_4bit(module: Any) -> Storage:
    weight = module.weight
    if is_dtensor(weight):
        raise UnsupportedError(
            f"cannot read {describe(module)}: its packed 4-bit bytes are sharded as a DTensor; "
            "create the adapter before the model is sharded"
        )
    _refuse_zero3_shard(module, weight)
    state = quant_state_4bit(module)
    kind = state.quant_type if state is not None else getattr(weight, "quant_type", None)
    if kind not in ("nf4", "fp4"):
        raise UnsupportedError(f"cannot read {describe(module)} of 4-bit type {kind!r}: known are nf4 and fp4")
    if state is not None and state.shape is not None:
        shape = tuple(state.shape)
    else:
        shape = (module.out_features, module.in_features)
    dtype = module.compute_dtype or (state.dtype if state is not None else torch.float32)
    return Storage(
        kind="meta" if weight.is_meta else kind,
        shape=(shape[0], shape[1]),
        dtype=dtype,
        transposed=False,
        quantized=weight.is_meta or state is not None,
    )


def _storage_8bit(module: Any) -> Storage:
    weight = module.weight
    if is_dtensor(weight):
        raise UnsupportedError(
            f"cannot read {describe(module)}: its int8 codes are sharded as a DTensor; "
            "create the adapter before the model is sharded"
        )
    _refuse_zero3_shard(module, weight)
    keeps_float = bool(module.state.has_fp16_weights)
    if keeps_float:
        _refuse_unreadable(module, weight)
    kind: Kind = "float" if keeps_float else "int8"
    return Storage(
        kind="meta" if weight.is_meta else kind,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype if keeps_float else torch.float16,
        transposed=False,
        quantized=not keeps_float and (weight.is_meta or weight.dtype == torch.int8),
    )


def _refuse_unreadable(module: nn.Module, weight: Any) -> None:
    """Raise unless `weight` is one whole two-dimensional float matrix (or a DTensor of one)."""
    if not isinstance(weight, torch.Tensor) or hasattr(module, "qweight"):
        raise UnsupportedError(f"cannot read the weight of {describe(module)}: {_READABLE}")
    _refuse_zero3_shard(module, weight)
    plain = type(weight) in (torch.Tensor, nn.Parameter) or type(weight).__name__ == "Int8Params"
    if not plain and not is_dtensor(weight):
        raise UnsupportedError(f"cannot read the weight of {describe(module)}: {_READABLE}")
    if weight.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(f"cannot read the weight of {describe(module)}: {_READABLE}")
    if weight.dim() != 2:
        raise UnsupportedError(
            f"cannot read the weight of {describe(module)}: a matrix was expected; a flattened or sharded "
            "parameter must be gathered first (or create the adapter before the model is sharded)"
        )


def _refuse_zero3_shard(module: nn.Module, weight: Any) -> None:
    """DeepSpeed ZeRO-3 leaves an empty tensor behind; while gathered it holds all of `ds_shape`."""
    ds_shape = getattr(weight, "ds_shape", None)
    if ds_shape is not None and weight.numel() != math.prod(ds_shape):
        raise UnsupportedError(
            f"cannot read the weight of {type(module).__name__}: it is a DeepSpeed ZeRO-3 shard of a "
            f"{tuple(ds_shape)} matrix; read it inside deepspeed.zero.GatheredParameters([module.weight])"
        )


def _shape_text(weight: torch.Tensor) -> str:
    return "uninitialized" if _has_base(weight, "torch", "UninitializedTensorMixin") else str(tuple(weight.shape))
