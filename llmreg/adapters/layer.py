"""Layers that hold additive adapters beside plain LoRA ones, over float, NF4/FP4 and int8 bases.

PEFT's own LoRA layers do the bookkeeping, merging and dispatch; this adds the frozen start `lora_A0`, `lora_B0` of
each additive adapter and routes it through `AdditiveVariant`. On one layer some adapters may be additive and others
plain LoRA.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from ..errors import UnsupportedError
from .config import AdditiveConfig
from .difference import add_difference, concatenate
from .loading import exact_factors

__all__ = ["AdditiveLayer", "AdditiveLinear", "AdditiveVariant", "additive_class", "downgrade", "upgrade"]

_FROZEN = ("lora_A0", "lora_B0")


class _Factor(nn.Linear):
    """A factor's weight in the shape PEFT expects of `lora_A[...]`; left unset, so that no random number is drawn."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass


class AdditiveVariant(LoraVariant):
    """PEFT's hook for an adapter whose forward is not `B A x`: here the difference form."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to do: factors are set by the tuner, once all layers are in place."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        A, B, A0, B0 = module.factors(active_adapter)
        return add_difference(result, x, A, B, A0, B0, module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


class AdditiveLayer:
    """Mixin in front of one of PEFT's LoRA layers; see the module's docstring."""

    # Not among `adapter_layer_names`, for which PEFT switches `requires_grad` on and off.
    other_param_names = (*LoraLayer.other_param_names, *_FROZEN)

    def prepare_frozen(self: Any) -> None:
        """Create the containers of the frozen factors, if they are not there yet."""
        if not hasattr(self, "lora_A0"):
            self.lora_A0 = nn.ModuleDict({})
            self.lora_B0 = nn.ModuleDict({})
            self._kept_weight: Any = None
            self._exact_unmerge: set[str] = set()

    def resolve_lora_variant(self: Any, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        if isinstance(config, AdditiveConfig):
            return AdditiveVariant()
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def update_layer(self: Any, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add (unset) factors for an additive adapter; a plain LoRA config is PEFT's business."""
        self.prepare_frozen()
        if not isinstance(config, AdditiveConfig):
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
            return
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        self.lora_dropout.update({adapter_name: nn.Identity()})
        self.lora_A[adapter_name] = _Factor(self.in_features, r)
        self.lora_B[adapter_name] = _Factor(r, self.out_features)
        self.lora_A0[adapter_name] = _Factor(self.in_features, r).requires_grad_(False)
        self.lora_B0[adapter_name] = _Factor(r, self.out_features).requires_grad_(False)
        self.lora_variant[adapter_name] = AdditiveVariant()
        if config.exact_unmerge:
            self._exact_unmerge.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self: Any, adapter_name: str, device: Any = None) -> None:
        """As in PEFT; but factors that come from a sidecar keep their dtype, or they would not stay bit-exact."""
        exact = exact_factors()
        if not exact or adapter_name not in self.lora_A0:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)  # type: ignore[misc]
            return
        device = device or self.get_base_layer().weight.device
        dtype = functools.reduce(torch.promote_types, {value.dtype for value in exact.values()})
        for name in ("lora_A", "lora_B", *_FROZEN):
            factor = getattr(self, name)[adapter_name]
            if not factor.weight.is_meta:  # with low_cpu_mem_usage the loaded tensors take the parameters' place
                factor.to(device, dtype)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self._exact_unmerge.discard(adapter_name)

    def factors(self: Any, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`A (r, in)`, `B (out, r)`, `A0`, `B0` of an additive adapter.

        TRL casts only parameters that require gradients (to bf16 on a quantised base). The frozen start then takes
        the same dtype, and so the same rounding, the first time it is looked at: `A - A0` stays zero at step 0.
        """
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        A0, B0 = self.lora_A0[adapter_name].weight, self.lora_B0[adapter_name].weight
        if A0.dtype != A.dtype:
            A0.data = A0.data.to(A.dtype)
        if B0.dtype != B.dtype:
            B0.data = B0.data.to(B.dtype)
        return A, B, A0, B0

    @torch.no_grad()
    def set_factors(self: Any, adapter_name: str, A: Tensor, B: Tensor) -> None:
        """Start (or restart) an additive adapter at `A (r, in)`, `B (out, r)`: the difference becomes zero."""
        for name, value in (("lora_A", A), ("lora_B", B), ("lora_A0", A), ("lora_B0", B)):
            getattr(self, name)[adapter_name].weight.copy_(value)

    @torch.no_grad()
    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """What merging adds to the base weight, in its layout; at least fp32, so that it is rounded only once."""
        if not isinstance(self.lora_variant.get(adapter), AdditiveVariant):
            return super().get_delta_weight(adapter)  # type: ignore[misc]
        down, up = concatenate(*(f if f.dtype == torch.float64 else f.float() for f in self.factors(adapter)))
        delta = (up @ down).mul_(self.scaling[adapter])
        return delta.t() if self.fan_in_fan_out else delta

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self._exact_unmerge and not self.merged:  # whichever adapter is merged first
            self._kept_weight = _copy_storage(self.get_base_layer())
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            if not self.merged:
                self._kept_weight = None
        _restore_int8_scales(self.get_base_layer())

    def unmerge(self: Any) -> None:
        kept, self._kept_weight = self._kept_weight, None
        if kept is None:
            super().unmerge()  # type: ignore[misc]
            _restore_int8_scales(self.get_base_layer())
        else:
            self.merged_adapters.clear()
            _put_back_storage(self.get_base_layer(), kept)


def _refuse_other_start(name: str) -> Any:
    """One of `LoraLayer`'s initialisations, refused for additive adapters: it would leave `A0`, `B0` behind."""

    def start(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if adapter_name in self.lora_A0:
            raise UnsupportedError(
                f"{name} would restart the additive adapter {adapter_name!r} as another kind of LoRA; delete it and "
                "add an adapter with the config you want."
            )
        return getattr(super(AdditiveLayer, self), name)(adapter_name, *args, **kwargs)

    return start


for (
    _name
) in "corda_init loftq_init lora_ga_init mica_init olora_init orthogonal_init pissa_init reset_lora_parameters".split():
    setattr(AdditiveLayer, _name, _refuse_other_start(_name))


def _copy_storage(base: nn.Module) -> tuple[Any, Any]:
    """The weight as it is stored, and bitsandbytes' int8 state where there is one."""
    return copy.deepcopy(base.weight), copy.deepcopy(getattr(base, "state", None))


def _put_back_storage(base: Any, kept: tuple[Any, Any]) -> None:
    weight, state = kept
    if state is not None or hasattr(weight, "quant_state"):
        base.weight = weight
    else:
        base.weight.data = weight.data  # the parameter object stays: ties and optimizers may refer to it
    if state is not None:
        base.state = state


def _restore_int8_scales(base: Any) -> None:
    """bitsandbytes moves int8 scales to `state` at the first forward; a re-quantised weight brings new ones."""
    state: Any = getattr(base, "state", None)
    weight: Any = getattr(base, "weight", None)
    if state is not None and getattr(weight, "SCB", None) is not None:
        state.CB, state.SCB = weight.data, weight.SCB


class AdditiveLinear(AdditiveLayer, LoraLinear):
    """Over `torch.nn.Linear` and `transformers.pytorch_utils.Conv1D` with float weights."""


def additive_class(base: nn.Module) -> Any:
    """The layer class that wraps `base` (a module `llmreg.weights.storage_of` accepts)."""
    if "bitsandbytes" in sys.modules:  # else there can be no quantised layer, and importing it is slow
        from .quantized import QUANTIZED_LAYERS

        for base_class, layer_class in QUANTIZED_LAYERS.items():
            if isinstance(base, base_class):
                return layer_class
    return AdditiveLinear


def upgrade(layer: Any) -> None:
    """Turn one of PEFT's LoRA layers into its additive counterpart in place, adapters and all."""
    if type(layer) is LoraLinear or type(layer).__module__ == "peft.tuners.lora.bnb":
        layer.__class__ = additive_class(layer.get_base_layer())
        layer.prepare_frozen()


def downgrade(layer: Any) -> None:
    """Undo `upgrade` on a layer that holds no additive adapter."""
    for name in (*_FROZEN, "_kept_weight", "_exact_unmerge"):
        delattr(layer, name)
    layer.__class__ = type(layer).__mro__[2]  # the class that `AdditiveLayer` was mixed into
