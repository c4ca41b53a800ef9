"""The tuner of Bone: injects layers, serves mixed batches, and translates live and stored form.

live     <layer>.bone_block.<adapter>.weight
stored   <layer>.miss_block where plain PEFT computes the same function as its `MISS`, else <layer>.bone_block
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..weights import gathered, storage_of
from .bone_layer import BoneLinear
from .rollback import unchanged_on_error
from .tuner_calls import TunerCalls

__all__ = ["STORED_NAMES", "BoneModel", "bone_layers", "stored_type"]

#: Name of the stored tensor by the peft type that stands in the saved config.
STORED_NAMES = {"MISS": "miss_block", "BONE": "bone_block"}


class BoneModel(TunerCalls, BaseTuner):
    """Tuner of the peft type `BONE`; see `peft.tuners.tuners_utils.BaseTuner` for what it inherits."""

    prefix = "bone_"
    tuner_layer_cls = BoneLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the targeted layers; on an error the model is as it was before."""
        try:
            with unchanged_on_error(self):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        with gathered([base]):
            try:
                storage_of(base)
            except UnsupportedError as error:
                raise UnsupportedError(f"Layer {current_key!r} cannot carry a bone adapter: {error}") from None
            if isinstance(target, BoneLinear):
                target.update_layer(adapter_name, peft_config)
                return
            layer = BoneLinear(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained before it is made active
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook for `adapter_names=`: hands each layer the adapter of each row while the context lasts."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names, kwargs.get("num_beams"))
        hook = partial(_pass_adapter_names, names=list(names))
        layers = [module for module in self.modules() if isinstance(module, BoneLinear | AuxiliaryTrainingWrapper)]
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Any, num_beams: Any) -> None:
        if self.training:
            raise UnsupportedError("adapter_names is for inference; call model.eval() first, or leave it out.")
        if isinstance(num_beams, int) and num_beams > 1:
            raise UnsupportedError("adapter_names does not go together with beam search; write num_beams=1.")
        unknown = sorted(set(names) - {"__base__"} - set(self.peft_config))
        if unknown:
            raise UnsupportedError(f"adapter_names has {unknown[0]!r}; there are {', '.join(self.peft_config)}.")

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
        """The adapter's tensors under the stored name, the adapter's own at the end (PEFT takes it off)."""
        live = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        name, ending = STORED_NAMES[stored_type(model, adapter_name)], f".bone_block.{adapter_name}.weight"
        return {
            f"{key.removesuffix(ending)}.{name}.{adapter_name}" if key.endswith(ending) else key: value
            for key, value in live.items()
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Stored names, of either kind -> this model's parameters."""
        live = {}
        for key, value in state_dict.items():
            layer, _, last = key.rpartition(".")
            live[f"{layer}.bone_block.{adapter_name}.weight" if last in STORED_NAMES.values() else key] = value
        return live


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def bone_layers(model: nn.Module, adapter_name: str) -> dict[str, BoneLinear]:
    """The layers that hold an adapter, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BoneLinear) and adapter_name in module.bone_block
    }


def stored_type(model: nn.Module, adapter_name: str) -> str:
    """ "MISS" where plain PEFT computes the same function from the saved adapter, else "BONE", which it refuses.

    PEFT's MiSS knows no Conv1D; and its `bat` replaces the base layer's own computation by a plain product.
    """
    for layer in bone_layers(model, adapter_name).values():
        base = layer.get_base_layer()
        quantised = storage_of(base).kind not in ("float", "meta")
        plain = type(base) is nn.Linear or quantised
        if not (plain if layer.bone_variant[adapter_name] == "bat" else plain or isinstance(base, nn.Linear)):
            return "BONE"
    return "MISS"
