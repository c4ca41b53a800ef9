"""Layers that hold additive adapters beside plain LoRA ones, over float, NF4/FP4 and int8 bases.

PEFT's own LoRA layers do the bookkeeping, merging and dispatch; this adds the factors that PEFT does not know (`forms`
says which an adapter has) and routes each additive adapter through its form. On one layer some adapters may be
additive, of several forms, and others plain LoRA.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from ..errors import UnsupportedError, WeightError
from ..initializers import Factors
from .config import AdditiveConfig
from .forms import CONTAINERS, FORMS, Form
from .kept_weight import copy_weight, put_back
from .loading import exact_factors
from .residual import LayerError, WayBack, refuse_residual_alone, refuse_residual_merge

__all__ = ["AdditiveLayer", "AdditiveLinear", "additive_class", "downgrade", "layers_of", "upgrade"]


class AdditiveLayer:
    """Mixin in front of one of PEFT's LoRA layers; see the module's docstring."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_S")
    # Not among `adapter_layer_names`, for which PEFT switches `requires_grad` on and off.
    other_param_names = (*LoraLayer.other_param_names, "lora_A0", "lora_B0", "lora_S0")

    def prepare_containers(self: Any) -> None:
        """Create the containers that PEFT's layers lack, if they are not there yet."""
        if not hasattr(self, "lora_A0"):
            for name in CONTAINERS:
                if not hasattr(self, name):
                    setattr(self, name, nn.ModuleDict({}))
            self._kept_weight: Any = None
            self._exact_unmerge: set[str] = set()
            self._unregularized: set[str] = set()
            #: Adapters that wait for `llmreg.initialize` (EVA, CorDA): zero until then, and refused in training.
            self.waiting: set[str] = set()
            #: Of adapters with frozen vectors: their largest relative error (Frobenius) by the dtype they are kept in.
            self.vector_error: dict[str, float] = {}
            #: Of the adapters for which the base layer holds a quantised residual: how well they make up `W` together.
            self.residual_error: dict[str, LayerError] = {}
            self.way_back: WayBack | None = None
            #: Of adapters made as copies beside one residual: of which.
            self.residual_copy: dict[str, str] = {}

    def form(self: Any, adapter_name: str) -> type[Form] | None:
        """The form of an additive adapter; None for a plain LoRA, or an adapter that this layer does not carry."""
        variant = self.lora_variant.get(adapter_name)
        return type(variant) if isinstance(variant, Form) else None

    def resolve_lora_variant(self: Any, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        if isinstance(config, AdditiveConfig):
            return FORMS[config.form()]()
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def update_layer(self: Any, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add (unset) factors for an additive adapter; a plain LoRA config is PEFT's business."""
        self.prepare_containers()
        if not isinstance(config, AdditiveConfig):
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
            return
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout.update({adapter_name: dropout})
        self.lora_variant[adapter_name] = FORMS[config.form()]()
        if config.exact_unmerge:
            self._exact_unmerge.add(adapter_name)
        if config.needs_regularizer():
            self._unregularized.add(adapter_name)
        self.set_rank(adapter_name, r)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_rank(self: Any, adapter_name: str, r: int) -> None:
        """(Re)make the factors of an additive adapter for rank `r`, unset; the scaling stays."""
        self.r[adapter_name] = r
        self.form(adapter_name).make(self, adapter_name, r)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def resize(self: Any, adapter_name: str, r: int, lora_alpha: float) -> None:
        """Remake the factors of an additive adapter for another rank and alpha, unset, as the old ones were kept."""
        containers = self.form(adapter_name).containers()
        before = {name: getattr(self, name)[adapter_name].weight for name in containers}
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if self.use_rslora[adapter_name] else r)
        self.set_rank(adapter_name, r)
        for name, old in before.items():
            factor = getattr(self, name)[adapter_name]
            factor.to(old.device, old.dtype).weight.requires_grad_(old.requires_grad)

    def _move_adapter_to_device_of_base_layer(self: Any, adapter_name: str, device: Any = None) -> None:
        """As in PEFT, and to the form's dtypes where it has its own (unset factors lose nothing by it).

        Factors that come from a sidecar keep their dtype, or they would not stay bit-exact.
        """
        form, exact = self.form(adapter_name), exact_factors()
        if form is None:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)  # type: ignore[misc]
            return
        base = self.get_base_layer()
        for name in form.containers():
            factor = getattr(self, name)[adapter_name]
            if not factor.weight.is_meta:  # with low_cpu_mem_usage the loaded tensors take the parameters' place
                dtype = exact and _dtype_of(exact, name)
                factor.to(device or base.weight.device, dtype or form.dtype(base, name))

    def delete_adapter(self: Any, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self._exact_unmerge.discard(adapter_name)
        self._unregularized.discard(adapter_name)
        self.waiting.discard(adapter_name)
        self.vector_error.pop(adapter_name, None)
        self.residual_error.pop(adapter_name, None)
        self.residual_copy.pop(adapter_name, None)

    def keep_unpacked(self: Any) -> None:
        """Keep bitsandbytes from rearranging 4-bit codes for a CPU, which discards scales that are yet to be saved."""
        base = self.get_base_layer()
        if hasattr(base, "support_avx512bf16_for_cpu"):
            base.support_avx512bf16_for_cpu = False

    def enable_adapters(self: Any, enabled: bool) -> None:
        if not enabled and self.residual_error:
            raise refuse_residual_alone()
        super().enable_adapters(enabled)  # type: ignore[misc]

    def factors(self: Any, adapter_name: str) -> dict[str, Tensor]:
        """The factors of an additive adapter by container, trained ones first, in the dtypes that they compute in."""
        form = self.form(adapter_name)
        form.settle_dtypes(self, adapter_name)
        return {name: getattr(self, name)[adapter_name].weight for name in form.containers()}

    def frozen_factors(self: Any, adapter_name: str) -> list[nn.Parameter]:
        """What an additive adapter keeps beside what it trains."""
        return [getattr(self, name)[adapter_name].weight for name in self.form(adapter_name).frozen]

    @torch.no_grad()
    def set_start(self: Any, adapter_name: str, start: Factors) -> None:
        """Start (or restart) an additive adapter: it then adds exactly nothing (EoRA: its compensation)."""
        self.form(adapter_name).set_start(self, adapter_name, start)
        self.waiting.discard(adapter_name)

    def take_dtypes(self: Any, adapter_name: str, sibling: str) -> None:
        """Keep an adapter's factors as those of a sibling are kept, so that both compute alike to the bit."""
        for name in self.form(adapter_name).containers():
            getattr(self, name)[adapter_name].to(getattr(self, name)[sibling].weight.dtype)

    @torch.no_grad()
    def wait(self: Any, adapter_name: str) -> None:
        """Let an additive adapter add nothing until it is given its start, and refuse to train it before."""
        self.form(adapter_name).clear(self, adapter_name)
        self.waiting.add(adapter_name)

    def start(self: Any, adapter_name: str) -> Factors:
        """The start that an additive adapter was given, in the dtypes that it computes in."""
        self.form(adapter_name).settle_dtypes(self, adapter_name)
        return self.form(adapter_name).start(self, adapter_name)

    def set_regularized(self: Any, adapter_name: str, regularized: bool) -> None:
        """Say whether something applies the regulariser that the adapter's config asks for."""
        (self._unregularized.discard if regularized else self._unregularized.add)(adapter_name)

    def check_trainable(self: Any, adapter_name: str) -> None:
        """Refuse to train without the start or the regulariser that the adapter's config asks for (law 3).

        Raises:
            UnsupportedError: at the first training forward.
        """
        if not (adapter_name in self.waiting or adapter_name in self._unregularized):
            return
        # A new layer is in training mode also where the model around it is not.
        if not (self.training and self.get_base_layer().training and torch.is_grad_enabled()):
            return
        if adapter_name in self.waiting:
            raise UnsupportedError(
                f"The adapter {adapter_name!r} starts from data and has seen none; call llmreg.initialize(trainer), or "
                "llmreg.initialize(model, dataloader), before training."
            )
        if adapter_name in self._unregularized:
            raise UnsupportedError(
                f"The config of adapter {adapter_name!r} asks for a regulariser, and nothing applies it; pass "
                "callbacks=[llmreg.RegularizerCallback()] to the trainer, or write weights=None to take only the start."
            )

    @torch.no_grad()
    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """What merging adds to the base weight, in its layout; at least fp32, so that it is rounded only once."""
        form = self.form(adapter)
        if form is None:
            return super().get_delta_weight(adapter)  # type: ignore[misc]
        factors = self.factors(adapter).items()
        if not all(bool(factor.isfinite().all()) for _, factor in factors):
            raise WeightError(
                f"The adapter {adapter!r} holds NaN or infinite values, so it cannot be merged; use another "
                "checkpoint of it."
            )
        down, up = form.low_rank({name: f if f.dtype == torch.float64 else f.float() for name, f in factors})
        delta = (up @ down).mul_(self.scaling[adapter])
        return delta.t() if self.fan_in_fan_out else delta

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self.residual_error:
            raise refuse_residual_merge()
        if self._exact_unmerge and not self.merged:  # whichever adapter is merged first
            self._kept_weight = copy_weight(self.get_base_layer())
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
            put_back(self.get_base_layer(), kept)


def _refuse_other_start(name: str) -> Any:
    """One of `LoraLayer`'s initialisations, refused for additive adapters: it would leave `A0`, `B0` behind."""

    def start(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if self.form(adapter_name) is not None:
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


def _dtype_of(tensors: dict[str, Tensor], container: str) -> torch.dtype | None:
    """The dtype that holds a container's tensors of all layers exactly; None if there are none."""
    dtypes = {value.dtype for key, value in tensors.items() if f".{container}." in key}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _restore_int8_scales(base: Any) -> None:
    """bitsandbytes moves int8 scales to `state` at the first forward; a re-quantised weight brings new ones."""
    state: Any = getattr(base, "state", None)
    weight: Any = getattr(base, "weight", None)
    if state is not None and getattr(weight, "SCB", None) is not None:
        state.CB, state.SCB = weight.data, weight.SCB


class AdditiveLinear(AdditiveLayer, LoraLinear):
    """Over `torch.nn.Linear` and `transformers.pytorch_utils.Conv1D` with float weights."""


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The layers of `model` that carry an additive adapter, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdditiveLayer) and module.form(adapter_name)
    }


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
        layer.prepare_containers()


def downgrade(layer: Any) -> None:
    """Undo `upgrade` on a layer that holds no additive adapter."""
    added = [name for name in CONTAINERS if name not in LoraLayer.adapter_layer_names]
    state = (
        "_kept_weight _exact_unmerge _unregularized waiting vector_error residual_error way_back residual_copy".split()
    )
    for name in (*added, *state):
        delattr(layer, name)
    layer.__class__ = type(layer).__mro__[2]  # the class that `AdditiveLayer` was mixed into
