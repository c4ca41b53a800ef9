"""The one tuner of all additive methods: injects layers, starts their factors, translates live and stored form.

It is PEFT's `LoraModel` with another layer class, so plain LoRA adapters live beside additive ones, and each
adapter's config decides which it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..errors import AdapterFileError, UnsupportedError, WeightError
from ..weights import gathered, storage_of
from .config import AdditiveConfig, base_change
from .data_configs import DataConfig
from .data_start import start_from_data, waiting_layers
from .forms import CONTAINERS, FORMS
from .layer import AdditiveLayer, additive_class, downgrade, upgrade
from .loading import exact_factors, expected_start, starts
from .quantized_start import check_base, check_layer, restore_base, start_residual
from .residual import check_together, has_residual, refuse_residual_alone, refuse_residual_merge
from .rollback import unchanged_on_error
from .start import start_factors
from .stored_form import from_stored, to_stored
from .tiny import check_vectors, is_tiny
from .tuner_calls import TunerCalls

__all__ = ["AdditiveModel", "adopt", "is_additive", "live_factors", "release"]

_EXPORT_FIRST = "export it to plain LoRA first (llmreg.export_lora) and use the export"


class AdditiveModel(TunerCalls, LoraModel):
    """Tuner of the peft type `LLMREG_ADDITIVE`; see `peft.tuners.lora.LoraModel` for what it inherits."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the targeted layers and start the factors; on an error the model is as it was before."""
        config = self.peft_config[adapter_name]
        if isinstance(config, AdditiveConfig) and config.records_start():  # not in the caller's config
            config = self.peft_config[adapter_name] = copy.copy(config)
        try:
            with unchanged_on_error(self):
                check_together(self.peft_config)
                if isinstance(config, AdditiveConfig):
                    _check_model(config, model, adapter_name)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                if isinstance(config, AdditiveConfig):
                    config.on_model = True
                    if isinstance(config, DataConfig):
                        config.asked = config.request()  # type: ignore[misc]
                    if starts():
                        self._start(adapter_name, config)
                    else:  # a layer that the file does not bring must not keep what its memory held
                        _clear(model, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name)
            if self.peft_config and not any(map(is_additive, self.peft_config.values())):
                release(self)
            raise

    def _start(self, adapter_name: str, config: AdditiveConfig) -> None:
        """Give a new adapter its start, or let it wait for its data."""
        if isinstance(config, DataConfig):
            start_from_data(self, adapter_name)
        elif config.quantizes_residual():
            start_residual(self, adapter_name)
        else:
            start_factors(self.model, adapter_name, config, self.peft_config)
            expected = expected_start()
            if expected is not None:
                check_vectors(self.model, adapter_name, expected)

    def _check_new_adapter_config(self, config: Any) -> None:
        """Refuse to let an additive adapter share its base with a plain LoRA that changes the base."""
        super()._check_new_adapter_config(config)
        if not any(map(is_additive, self.peft_config.values())):
            return
        for name, other in self.peft_config.items():
            change = None if is_additive(other) else base_change(other)
            if change:
                raise UnsupportedError(
                    f"The plain LoRA adapter {name!r} changes the base weights ({change}), on which an additive "
                    "adapter relies; give each its own copy of the model, or leave that setting out."
                )

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        with gathered([base]):
            if isinstance(lora_config, AdditiveConfig):
                _check_target(lora_config, base, current_key)
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
            )

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        try:
            storage = storage_of(base)
        except UnsupportedError:
            if isinstance(lora_config, AdditiveConfig):
                raise
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        # PEFT warns and corrects the config when it meets the other layout; the layer itself says which it is.
        lora_config.fan_in_fan_out = storage.transposed
        return additive_class(base)(target, adapter_name, config=lora_config, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT, which turns half-precision factors into float32; but a form's own dtypes stay."""
        config = self.peft_config[adapter_name]
        if not (isinstance(config, AdditiveConfig) and FORMS[config.form()].own_dtypes):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    # -- live form <-> stored form ------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The difference form under plain LoRA's names: rank 2r, loadable by plain PEFT."""
        live = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not isinstance(config, AdditiveConfig):
            return live
        return to_stored(live, FORMS[config.form()], tiny=is_tiny(config), as_trained=config.quantizes_residual())

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Stored names and form -> this model's parameters."""
        if isinstance(config, AdditiveConfig):
            exact = exact_factors()
            present = live_factors(model, adapter_name) if exact is None or is_tiny(config) else None
            state_dict = from_stored(state_dict, exact, FORMS[config.form()], present)
            for layer in waiting_layers(model, adapter_name).values():  # what is loaded is not waited for
                layer.waiting.discard(adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # -- what a base that holds a quantised residual does not do, and the way back to its own weights ---------------

    def disable_adapter_layers(self) -> None:
        """As in PEFT; refused where the base without its adapter is a quantised residual."""
        if has_residual(self.model):
            raise refuse_residual_alone()
        super().disable_adapter_layers()

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if "__base__" in (kwargs.get("adapter_names") or ()) and has_residual(self.model):
            raise refuse_residual_alone()
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if has_residual(self.model):
            raise refuse_residual_merge()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; the last adapter beside a quantised residual gives the base its own weights back."""
        if adapter_name in self.peft_config:
            with unchanged_on_error(self):
                restore_base(self, [adapter_name])
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """The base model bit for bit, also after a quantised residual was made of it."""
        with unchanged_on_error(self):
            restore_base(self, list(self.peft_config))
        return super().unload()

    # -- what LoraModel offers and an additive adapter does not --------------------------------------------------

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As in PEFT for plain LoRA adapters; an additive adapter among them is refused."""
        additive = [name for name in adapters if isinstance(self.peft_config.get(name), AdditiveConfig)]
        if additive:
            raise UnsupportedError(
                f"add_weighted_adapter combines the factors of plain LoRA adapters, and {additive} are not: "
                f"{_EXPORT_FIRST}."
            )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused: nothing was subtracted from the base, and what is saved is plain LoRA already."""
        raise UnsupportedError(
            "subtract_mutated_init undoes a change of the base weights, and llmreg never changes them: "
            "save_pretrained already writes plain LoRA."
        )

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise UnsupportedError(
            "path_initial_model_for_weight_conversion is not needed: save_pretrained already writes plain LoRA for "
            "the original base; leave the argument out."
        )


@torch.no_grad()
def _clear(model: nn.Module, adapter_name: str) -> None:
    for module in model.modules():
        if isinstance(module, AdditiveLayer) and (form := module.form(adapter_name)):
            form.clear(module, adapter_name)


def _check_model(config: AdditiveConfig, model: nn.Module, adapter_name: str) -> None:
    """Refuse, before anything is changed, a model that cannot hold a quantised residual, and a config without one.

    Raises:
        AdapterFileError: the config was read from a folder whose sidecar, which its residual is known by, is missing.
    """
    if config.needs_sidecar:
        raise AdapterFileError(
            "The adapter lies beside a quantised residual, and its llmreg.json, by which that is recognised, is "
            "missing; copy the whole folder, and load the adapter on its residual/."
        )
    fresh = starts() and not any(getattr(module, "residual_error", None) for module in model.modules())
    if fresh and (config.quantizes_residual() or getattr(getattr(model, "config", None), "llmreg_residual", None)):
        check_base(model, adapter_name)


def _check_target(config: AdditiveConfig, base: nn.Module, name: str) -> None:
    """Refuse, by name, a layer that cannot be decomposed or that is smaller than its rank."""
    try:
        shape = storage_of(base).shape
    except UnsupportedError as error:
        raise UnsupportedError(f"Layer {name!r} cannot carry a {config.method} adapter: {error}") from None
    ranks = config.rank_pattern or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), name)) or config.r
    config.check_layer(name, shape, rank)
    if config.quantizes_residual():
        check_layer(base, name)
    if rank > min(shape):
        raise WeightError(
            f"Rank {rank} is larger than layer {name!r} allows: its weight is {shape[0]} x {shape[1]}, so r can be at "
            f"most {min(shape)}; lower r, set rank_pattern for this layer, or exclude it."
        )


def adopt(tuner: LoraModel) -> None:
    """Let a plain `LoraModel` hold additive adapters too: its class and its layers' classes are exchanged in place."""
    if type(tuner) is LoraModel:
        tuner.__class__ = AdditiveModel
        for module in list(tuner.model.modules()):
            if isinstance(module, BaseTunerLayer) and not isinstance(module, AdditiveLayer):
                upgrade(module)


def release(tuner: LoraModel) -> None:
    """Undo `adopt`: a tuner without additive adapters, and its layers, are PEFT's own again."""
    for module in list(tuner.model.modules()):
        if isinstance(module, AdditiveLayer):
            downgrade(module)
    tuner.__class__ = LoraModel


def is_additive(config: LoraConfig) -> bool:
    """Whether a config describes an additive adapter (and not, say, a plain LoRA beside it)."""
    return isinstance(config, AdditiveConfig)


def live_factors(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All factors of every layer of an additive adapter, bit-exact, under names without the adapter's.

    Args:
        model: the `PeftModel`.
        adapter_name: an additive adapter.
        state_dict: the gathered state of a sharded model; the model's own by default.
    """
    for module in model.modules():
        if isinstance(module, AdditiveLayer) and module.form(adapter_name):
            module.factors(adapter_name)  # the frozen start takes the factors' dtype now, if it has not yet
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    live = _filter_state_dict_by_key_prefixes(state_dict or model.state_dict(), prefixes)
    named = {AdditiveModel._remove_adapter_name_from_key(key, adapter_name): value for key, value in live.items()}
    return {key: value for key, value in named.items() if key.split(".")[-2] in CONTAINERS}
