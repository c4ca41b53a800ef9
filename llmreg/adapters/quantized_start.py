"""The start of an adapter beside a quantised residual (QPiSSA, arXiv 2404.02948), and the way back to the base.

    R = q(W - s B0 A0)          the base layer holds R, the adapter adds s B A x to R x, and starts at B0, A0

`W` comes from the full-precision checkpoint, one layer at a time, while the model stays in 4 or 8 bits. Decomposing
and quantising take turns (`initializers.quantized_residual`); what is put into the layer is the very object that the
kept error was measured with. The factors are rounded first: to the dtype they are kept in, and to bfloat16, which TRL
casts the adapters of quantised models to, so that no later cast moves them away from what the residual was made for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LlmregWarning, UnsupportedError, WeightError
from ..initializers import Factors, quantized_residual
from ..progress import track
from ..weights import (
    OriginalWeights,
    dequantize,
    is_sharded,
    original_checkpoint,
    requantize,
    storage_of,
    stored_tensors,
)
from ..weights.hashing import update
from ..weights.quantized import quantized_parts
from .kept_weight import replace_weight
from .layer import AdditiveLayer, layers_of
from .residual import LayerError, WayBack
from .start import decomposing_device, is_distributed
from .start_key import fast_digest

__all__ = [
    "check_base",
    "check_layer",
    "forget_records",
    "restore_base",
    "set_residual",
    "share_residual",
    "start_residual",
]

#: Dtypes that a checkpoint's weight may have been rounded to before it was quantised.
_LOADED_AS = (torch.float32, torch.bfloat16, torch.float16)


# -- before anything is changed -----------------------------------------------------------------------------------


def check_layer(base: nn.Module, name: str) -> None:
    """Refuse a layer that cannot hold a quantised residual.

    Raises:
        UnsupportedError: it is not quantised, or sharded.
    """
    if is_sharded(base):
        raise UnsupportedError(
            f"Layer {name!r} is sharded (DeepSpeed ZeRO-3 or FSDP), and residual='quantized' replaces whole weights; "
            "train with DDP or ZeRO-2, or use residual='difference'."
        )
    if not storage_of(base).quantized:
        raise UnsupportedError(
            f"residual='quantized' quantises what the adapter does not carry, and layer {name!r} is not quantised; "
            "load the model with quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4') or load_in_8bit=True, exclude the layer, or use residual='difference'."
        )


def check_base(model: nn.Module, adapter_name: str) -> None:
    """Refuse a model whose residual could not be saved, or that holds one already.

    Raises:
        UnsupportedError: what to do instead.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "llmreg_residual", None):
        raise UnsupportedError(
            "This model was loaded from the residual/ of a saved adapter and lacks what that adapter carries; load the "
            "adapter on it with peft.PeftModel.from_pretrained, or start from the full-precision checkpoint."
        )
    if getattr(model, "hf_quantizer", None) is None or getattr(config, "quantization_config", None) is None:
        raise UnsupportedError(
            "residual='quantized' saves the base that it makes as a bitsandbytes checkpoint, which takes a model that "
            "transformers quantised: load it by from_pretrained(..., quantization_config=BitsAndBytesConfig(...))."
        )
    if adapter_name == "residual":
        raise UnsupportedError("The adapter cannot be called 'residual': the folder of that name is its base's.")


# -- the start ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_residual(tuner: Any, adapter_name: str) -> None:
    """Start a new adapter of a method that needs no data, and let its base layers hold the residuals.

    A copy of an adapter that has its residual (TRL's reference) shares that and takes its start.

    Raises:
        WeightError: the full-precision checkpoint cannot be read, or is of another model; NaN or Inf in a weight.
    """
    config = tuner.peft_config[adapter_name]
    layers = layers_of(tuner.model, adapter_name)
    if any(layer.lora_A[adapter_name].weight.is_meta for layer in layers.values()):
        raise UnsupportedError(
            "low_cpu_mem_usage=True leaves the factors without values, and the residual is made for their values; "
            "leave it out."
        )
    if share_residual(tuner, adapter_name, start=True):
        return
    forget_records(tuner)
    weights = OriginalWeights(tuner.model)
    for name, layer in track(list(layers.items()), f"{config.method}: quantising residuals"):
        W = weights.read(layer.get_base_layer(), name, device=decomposing_device())
        rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]

        def decompose(M: Tensor, name: str = name, rank: int = rank, scaling: float = scaling) -> Factors:
            return config.start(M, rank, scaling, name)

        set_residual(layer, adapter_name, name, W, decompose, weights, config.residual_iterations)


def share_residual(tuner: Any, adapter_name: str, *, start: bool) -> bool:
    """Let an adapter share the residual of its sibling, if one has it; with its sibling's `start` where asked for."""
    layers = layers_of(tuner.model, adapter_name)
    for sibling in tuner.peft_config:
        if sibling != adapter_name and layers and all(sibling in layer.residual_error for layer in layers.values()):
            for layer in layers.values():
                layer.residual_error[adapter_name] = layer.residual_error[sibling]
                layer.residual_copy[adapter_name] = layer.residual_copy.get(sibling, sibling)
                if start:
                    layer.set_start(adapter_name, layer.start(sibling))
            return True
    return False


def forget_records(tuner: Any) -> None:
    """What was recorded of the base for sidecars (`hub.base_records`) is of other weights now."""
    vars(tuner).pop("_llmreg_base_records", None)


@torch.no_grad()
def set_residual(
    layer: Any,
    adapter_name: str,
    name: str,
    W: Tensor,
    decompose: Callable[[Tensor], Factors],
    weights: OriginalWeights,
    iterations: int,
) -> None:
    """Fit residual and adapter of one layer to each other and put both in place.

    Args:
        layer: the adapted layer. name: its name in the base model.
        W: `(out, in)`, the full-precision weight. decompose: a matrix of its shape to the adapter's factors.
        weights: the checkpoint that `W` is from. iterations: `T`.

    In a distributed run every rank takes the factors and the quantised bytes of the first.
    """
    base = layer.get_base_layer()
    way_back = _way_back(base, name, W, weights)

    def quantize(M: Tensor) -> tuple[nn.Parameter, Tensor]:
        stored = requantize(base, M.to(base.weight.device), name=name)
        return stored, dequantize(stored, name=name).to(M.device)

    try:
        result = quantized_residual(
            W,
            _rounding(layer, adapter_name, decompose),
            quantize,
            scaling=layer.scaling[adapter_name],
            iterations=iterations,
            form="diagonal" if "lora_S" in layer.form(adapter_name).trained else "product",
        )
    except WeightError as error:
        raise WeightError(f"layer {name!r}: {error}") from error
    kept, first = result.errors[result.iteration].frobenius, result.errors[0].frobenius
    norm = torch.linalg.vector_norm(W, dtype=torch.float64).item()
    measured = LayerError(first, kept, norm, result.iteration)
    stored, factors, measured = _of_rank_0(result.quantized, result.factors, measured)
    replace_weight(base, stored)
    layer.keep_unpacked()
    layer.set_start(adapter_name, factors)
    layer.way_back = way_back
    layer.residual_error[adapter_name] = measured


def _rounding(layer: Any, adapter_name: str, decompose: Callable[[Tensor], Factors]) -> Callable[[Tensor], Factors]:
    """`decompose` with its factors rounded as they will be trained."""
    dtype = layer.lora_A[adapter_name].weight.dtype

    def rounded(value: Tensor) -> Tensor:
        return value.to(torch.bfloat16).to(dtype).to(value.dtype)

    def decompose_and_round(M: Tensor) -> Factors:
        found = decompose(M)
        return Factors(rounded(found.A), rounded(found.B), rounded(found.singular_values))

    return decompose_and_round


def _of_rank_0(stored: nn.Parameter, factors: Factors, error: LayerError) -> tuple[nn.Parameter, Factors, LayerError]:
    """What the first rank chose, on every rank: equal to the last bit, whatever each rank's hardware rounds to."""
    if not is_distributed():
        return stored, factors, error
    whole = Factors(factors.A.contiguous(), factors.B.contiguous(), factors.singular_values.contiguous())
    for tensor in (whole.A, whole.B, whole.singular_values, *stored_tensors(stored)):
        dist.broadcast(tensor, src=0)
    chosen = [error]
    dist.broadcast_object_list(chosen, src=0)
    return stored, whole, chosen[0]


# -- and back -----------------------------------------------------------------------------------------------------


def _way_back(base: Any, name: str, W: Tensor, weights: OriginalWeights) -> WayBack:
    """How `W` becomes what the layer holds now, to the last bit; where it does not, that weight is kept."""
    packs = getattr(base, "support_avx512bf16_for_cpu", None)
    digest = _digest(base, base, name)
    for dtype in _LOADED_AS:
        again = requantize(base, W.to(dtype).to(base.weight.device), name=name)
        if digest is None or _digest(base, SimpleNamespace(weight=again), name) == digest:
            return WayBack(weights.folder, dtype, digest, None, packs)
    return WayBack(weights.folder, torch.float32, digest, (base.weight, getattr(base, "state", None)), packs)


def _digest(base: nn.Module, holder: Any, name: str) -> str | None:
    """Hash of the quantised weight that `holder` has, of a layer stored as `base` is; None where it has no bytes."""
    digest = fast_digest("")
    try:
        for label, part in quantized_parts(holder, storage_of(base), name):
            update(digest, label, part)
    except WeightError:  # repacked for a CPU
        return None
    return digest.hexdigest()


@torch.no_grad()
def restore_base(tuner: Any, names: list[str]) -> None:
    """Give the base layers their own weights back that hold residuals of the adapters `names` alone.

    Layers whose residual was loaded, and not made here, keep what they were loaded with, with a warning.

    Raises:
        WeightError: the full-precision checkpoint is gone, or is not what it was.
    """
    sources: dict[Any, OriginalWeights] = {}
    loaded = False
    for name, layer in tuner.model.named_modules():
        if not isinstance(layer, AdditiveLayer):
            continue
        way_back: WayBack | None = layer.way_back
        if not layer.residual_error or layer.residual_error.keys() - set(names):
            continue
        if way_back is None:
            loaded = True
            continue
        base: Any = layer.get_base_layer()  # type: ignore[attr-defined]
        if way_back.kept is not None:
            _put_back(base, *way_back.kept)
        else:
            if way_back.source not in sources:
                with original_checkpoint(way_back.source):
                    sources[way_back.source] = OriginalWeights(tuner.model)
            _requantize(base, name, way_back, sources[way_back.source])
        if way_back.packs is not None:
            base.support_avx512bf16_for_cpu = way_back.packs
        layer.way_back = None
    if loaded:
        warnings.warn(
            "What is left without the adapter is the quantised residual that was loaded with it, which is no base "
            "model: for that load the original checkpoint.",
            LlmregWarning,
            stacklevel=4,
        )
    forget_records(tuner)


def _put_back(base: Any, weight: nn.Parameter, state: Any) -> None:
    replace_weight(base, weight)
    if state is not None:
        base.state = state


def _requantize(base: Any, name: str, way_back: WayBack, weights: OriginalWeights) -> None:
    W = weights.reread(base, name, device=base.weight.device).to(way_back.dtype)
    stored = requantize(base, W, name=name)
    if way_back.digest not in (None, _digest(base, SimpleNamespace(weight=stored), name)):
        raise WeightError(
            f"layer {name!r}: {weights.folder} no longer gives the weight that was quantised when the adapter was "
            "started; restore the checkpoint, or load the base again."
        )
    replace_weight(base, stored)
