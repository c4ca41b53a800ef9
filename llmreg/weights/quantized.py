"""bitsandbytes weights: codes and scales to floats and back, without ever touching the layer.

4-bit (NF4, FP4): `W = table[code] · absmax` per block of `blocksize` consecutive weights; with double
quantisation `absmax` is itself 8-bit codes, scales and an offset (QLoRA, arXiv 2305.14314).
int8: `W = CB · SCB / 127` per output row (LLM.int8(), arXiv 2208.07339).

Three traps are handled here and nowhere else:
- the packed 4-bit bytes may be *typed* as bfloat16, float16 or float32 (`bnb_4bit_quant_storage`);
- the int8 scales move from `weight.SCB` to `module.state.SCB` at the first forward, and putting
  the weight back into the module loses them;
- on CPUs with AVX512-BF16 the first evaluation forward repacks 4-bit weights in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmreg.errors import UnsupportedError, WeightError
from llmreg.weights.finite import all_finite, check_finite
from llmreg.weights.storage import Storage, describe, quant_state_4bit, storage_of

__all__ = ["dequantize", "requantize", "stored_tensors"]

_CPU_ROWS = 32  # rows that bitsandbytes interleaves in its AVX512-BF16 layout
_BITSANDBYTES_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def dequantize(weight: torch.Tensor, *, name: str = "") -> torch.Tensor:
    """The floats a (possibly quantised) parameter stands for, as `requantize` returned it.

    Args:
        weight: `Params4bit` or `Int8Params` carrying its own scales, or a float tensor.
        name: the layer, for the error message.

    Returns:
        For 4-bit: in the dtype bitsandbytes dequantises to; for int8: float32; a float tensor: itself.

    Raises:
        WeightError: the parameter is not quantised yet, or its scales are gone.
    """
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _dequantize_4bit(weight.data, getattr(weight, "quant_state", None), name)
    if kind == "Int8Params":
        return _dequantize_8bit(weight.data, getattr(weight, "SCB", None), name)
    return weight.detach().as_subclass(torch.Tensor)


def dequantize_module(module: nn.Module, storage: Storage, name: str) -> torch.Tensor:
    """(out, in) floats of a quantised layer, by reading only. See `dequantize`."""
    if storage.kind == "int8":
        return _dequantize_8bit(module.weight.data, int8_scales(module), name)  # type: ignore[arg-type]
    return _dequantize_4bit(module.weight.data, quant_state_4bit(module), name)  # type: ignore[arg-type]


def int8_scales(module: Any) -> torch.Tensor | None:
    """`SCB` (out,) wherever it is now: on the weight before the first forward, in the state after."""
    scales = getattr(module.weight, "SCB", None)
    return scales if scales is not None else module.state.SCB


def is_cpu_packed(state: Any) -> bool:
    """Whether bitsandbytes has rearranged this weight for AVX512-BF16 (scales rounded to bfloat16)."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def requantize(module: nn.Module, W: torch.Tensor, *, name: str = "") -> nn.Parameter:
    """A new frozen parameter holding `W` in the way `module` stores its own; `module` is not touched.

    Args:
        module: the layer whose settings are copied (quant type, block size, double quantisation,
            storage dtype; int8 rows; a float layer's dtype and orientation).
        W: (out, in), any float dtype.

    Returns:
        `Params4bit`, `Int8Params` or a plain float `Parameter` in the module's own orientation, on
        the device of `W`. `dequantize` reads it back. Assigning it to a Linear4bit that is later
        sharded also needs `module.quant_state = parameter.quant_state`.

    Raises:
        WeightError: shapes differ, or `W` does not fit the range of the stored dtype.
        UnsupportedError: an unknown storage, or a layer without data or not quantised yet.
    """
    storage = storage_of(module)
    if tuple(W.shape) != storage.shape:
        raise WeightError(f"{_layer(name)}: cannot store a {tuple(W.shape)} matrix in a {storage.shape} layer")
    if storage.kind in ("nf4", "fp4", "int8") and not storage.quantized:
        raise _not_quantized(name)
    W = W.detach()
    if storage.kind == "float":
        stored = W.t() if storage.transposed else W
        return nn.Parameter(
            stored.to(storage.dtype, copy=True, memory_format=torch.contiguous_format), requires_grad=False
        )
    if storage.kind == "int8":
        return _requantize_8bit(W, name)
    if storage.kind in ("nf4", "fp4"):
        return _requantize_4bit(module, W, name)
    raise UnsupportedError(f"{_layer(name)}: {describe(module)} holds no data yet; load the model first")


def stored_tensors(weight: nn.Parameter) -> list[torch.Tensor]:
    """Everything by which two weights differ that `requantize` made for the same module: to be sent to another rank.

    Args:
        weight: `Params4bit` or `Int8Params`, as `requantize` returned it.

    Returns:
        The tensors that it uses, not copies; packed codes as bytes.
    """
    if type(weight).__name__ == "Int8Params":
        return [weight.data.as_subclass(torch.Tensor), weight.SCB]  # type: ignore[attr-defined]
    state = weight.quant_state  # type: ignore[attr-defined]
    nested = [state.offset, state.state2.absmax] if state.nested else []
    return [_as_bytes(weight.data), state.absmax, *nested]


def quantized_parts(module: nn.Module, storage: Storage, name: str) -> Iterator[tuple[str, torch.Tensor | str]]:
    """Everything that determines a quantised weight, as (label, tensor or text), for hashing.

    Independent of device, of the dtype in which packed bytes are typed, and of a forward having run.

    Raises:
        WeightError: not quantised yet, scales lost, or repacked for AVX512-BF16 (which discards
            the stored scales, so that their bytes no longer exist).
    """
    if not storage.quantized:
        raise _not_quantized(name)
    if storage.kind == "int8":
        scales = int8_scales(module)
        if scales is None:
            raise _scales_lost(name)
        yield "codes", module.weight.data.as_subclass(torch.Tensor)  # type: ignore[operator]
        yield "scales", scales.reshape(-1).float()
        return
    state = quant_state_4bit(module)
    if is_cpu_packed(state):
        raise WeightError(
            f"{_layer(name)}: bitsandbytes has repacked this 4-bit weight for AVX512-BF16 and dropped its "
            "stored scales; take the hash before the first forward in evaluation mode, or reload the model"
        )
    yield "settings", f"{state.blocksize}|{state.dtype}|{state.nested}"
    yield "codes", _as_bytes(module.weight.data)  # type: ignore[arg-type]
    yield "absmax", state.absmax
    yield "table", state.code
    if state.nested:
        yield "nested settings", f"{state.state2.blocksize}|{state.state2.dtype}"
        yield "nested absmax", state.state2.absmax
        yield "nested table", state.state2.code
        yield "offset", state.offset


def _dequantize_4bit(packed: torch.Tensor, state: Any, name: str) -> torch.Tensor:
    if state is None:
        raise _not_quantized(name)
    if is_cpu_packed(state):
        return _dequantize_cpu_packed(packed, state)
    from bitsandbytes.functional import dequantize_4bit

    # As a column of bytes: bitsandbytes takes a one-row array for a transposed weight, and a tiny
    # layer in a wide storage dtype has only one row.
    return dequantize_4bit(_as_bytes(packed), state).reshape(state.shape)


def _dequantize_cpu_packed(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Undo the AVX512-BF16 layout: 32 rows interleaved column by column, two columns a step.

    bitsandbytes' own inverse quantises the scales a second time and edits the state it is given.
    """
    rows, columns = state.shape
    out = torch.empty(rows, columns, dtype=state.original_dtype, device=packed.device)
    table = state.code.float()
    scales = state.absmax.t().float()  # (rows, blocks)
    for start in range(0, rows, _CPU_ROWS):
        block = packed[start : start + _CPU_ROWS].reshape(-1, _CPU_ROWS)
        codes = torch.cat([block & 0xF, block >> 4], dim=1).view(columns // 2, _CPU_ROWS, 2)
        codes = codes.transpose(0, 1).reshape(_CPU_ROWS, -1, state.blocksize)
        values = table[codes.long()] * scales[start : start + _CPU_ROWS, :, None]
        out[start : start + _CPU_ROWS] = values.view(_CPU_ROWS, columns).to(out.dtype)
    return out


def _dequantize_8bit(codes: torch.Tensor, scales: torch.Tensor | None, name: str) -> torch.Tensor:
    if codes.dtype != torch.int8:
        raise _not_quantized(name)
    if scales is None:
        raise _scales_lost(name)
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(codes, scales.reshape(-1).to(codes.device))


def _requantize_4bit(module: Any, W: torch.Tensor, name: str) -> nn.Parameter:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    state = quant_state_4bit(module)
    packed = is_cpu_packed(state)
    dtype = state.original_dtype if packed else state.dtype
    nested = bool(state.original_nested if packed else state.nested)
    storage_dtype = getattr(module.weight, "quant_storage", None) or module.quant_storage
    codes, new_state = quantize_4bit(
        _cast(W, dtype if dtype in _BITSANDBYTES_FLOATS else torch.float32, name),
        blocksize=state.blocksize,
        compress_statistics=nested,
        quant_type=state.quant_type,
        quant_storage=storage_dtype,
    )
    return Params4bit(
        codes,
        requires_grad=False,
        quant_state=new_state,
        blocksize=state.blocksize,
        compress_statistics=nested,
        quant_type=state.quant_type,
        quant_storage=storage_dtype,
        bnb_quantized=True,
    )


def _requantize_8bit(W: torch.Tensor, name: str) -> nn.Parameter:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    codes, scales, _ = int8_vectorwise_quant(_cast(W, torch.float16, name))
    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def _cast(W: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`W` contiguous in `dtype`; refuses values that become infinite there."""
    cast = W.to(dtype).contiguous()
    if all_finite(cast):
        return cast
    check_finite(W, name)
    if bool(cast.isinf().any()):
        raise WeightError(f"{_layer(name)}: values do not fit {dtype}, in which bitsandbytes quantises this layer")
    return cast


def _as_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes as a column of uint8, whatever dtype they are typed as. A view, not a copy."""
    packed = packed.as_subclass(torch.Tensor)
    return packed.contiguous().reshape(-1).view(torch.uint8).reshape(-1, 1)


def _layer(name: str) -> str:
    return f"layer {name!r}" if name else "a base layer"


def _not_quantized(name: str) -> WeightError:
    return WeightError(
        f"{_layer(name)}: a bitsandbytes layer that has not been quantised yet (that happens when the model "
        "is moved to its device); call model.to(device) first, or load it with from_pretrained"
    )


def _scales_lost(name: str) -> WeightError:
    return WeightError(
        f"{_layer(name)}: the int8 scales (SCB) of this layer are gone, as after "
        "peft's dequantize_module_weight on a layer that had run; reload the base model"
    )
