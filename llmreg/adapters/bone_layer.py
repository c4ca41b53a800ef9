"""The layer that holds Bone adapters of any variant, over float, NF4/FP4 and int8 bases and transformers' Conv1D.

    y = W x + sum over the active adapters of what `bone_function` adds

Every update is relative to the base weight, whatever other adapters are active (PEFT's MiSS applies several `bat`
adapters one after the other, so that their order matters). Variant, rank and dropout are each adapter's own.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedError, WeightError
from ..weights import dequantize, gathered, is_sharded, read_weight, storage_of
from .bone_config import BoneConfig
from .bone_function import add_bat, add_shared, bat_delta, bat_linear, shared_delta
from .bone_merge import merged, store, unmerged
from .kept_weight import copy_weight, put_back
from .loading import exact_factors

__all__ = ["BoneLinear", "block_shape"]

_WIDE = (torch.float32, torch.float64)


def block_shape(config: BoneConfig, out_features: int, in_features: int, name: str) -> tuple[int, ...]:
    """The shape of an adapter's parameter on a layer.

    Raises:
        UnsupportedError: the layer, by name, cannot be divided as the config asks.
    """
    r, size = config.r, f"its weight is {out_features} x {in_features}"
    if r > in_features:
        raise UnsupportedError(
            f"Layer {name!r} is too small for r={r}: {size}, so r can be at most {in_features}; lower r, or exclude it."
        )
    if config.variant == "bone":
        return r, out_features
    if config.variant == "mini":
        if out_features % config.mini_r:
            raise UnsupportedError(
                f"mini_r={config.mini_r} does not divide the {out_features} outputs of layer {name!r}; write one of "
                f"{_divisors(out_features)}, or exclude it."
            )
        return r, config.mini_r
    if out_features % r or in_features % r:
        raise UnsupportedError(
            f"Layer {name!r} cannot be cut into {r} x {r} blocks, as variant 'bat' needs: {size}; write one of "
            f"r={_divisors(math.gcd(out_features, in_features))}, use variant 'bone', or exclude it."
        )
    return out_features // r, r, r


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class _Block(nn.Module):
    """An adapter's parameter, `D` or `B`, as a module of its own.

    So that its name is `bone_block.<adapter>.weight`: TRL copies a trained adapter to its reference "ref" by replacing
    ".default." in the names of parameters, and passes over those that end with the adapter's name.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


def _is_whole(base: nn.Module) -> bool:
    """Whether this process holds the whole weight; torch.compile cannot trace the question, and compiles no shards."""
    return torch.compiler.is_compiling() or not is_sharded(base)


class BoneLinear(nn.Module, BaseTunerLayer):
    """Wraps one base layer that `llmreg.weights.storage_of` accepts; see the module's docstring."""

    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_variant", "bone_r", "bone_dropout")
    # PEFT's, which nn.Module's __getattr__ hides from the type checker.
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BoneConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        storage = storage_of(self.get_base_layer())
        self.out_features, self.in_features = storage.shape
        self.bone_block = nn.ModuleDict({})
        self.bone_variant: dict[str, str] = {}
        self.bone_r: dict[str, int] = {}
        self.bone_dropout: dict[str, float] = {}
        self.layer_name = name
        self._exact_unmerge: set[str] = set()
        self._kept_weight: Any = None
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BoneConfig) -> None:
        """Add an adapter at zero, where it is the base exactly."""
        shape = block_shape(config, self.out_features, self.in_features, self.layer_name)
        self.bone_block[adapter_name] = _Block(shape)
        self.bone_variant[adapter_name] = config.variant
        self.bone_r[adapter_name] = config.r
        self.bone_dropout[adapter_name] = float(config.bone_dropout)
        if config.exact_unmerge:
            self._exact_unmerge.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """As in PEFT; but an adapter that is being loaded keeps the dtype it was saved in, to stay bit-exact."""
        block: Any = self.bone_block[adapter_name]
        exact = exact_factors()
        if not exact or block.weight.is_meta:
            BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name, device)
            return
        dtypes = {value.dtype for key, value in exact.items() if key.endswith((".bone_block", ".miss_block"))}
        device = device or self.get_base_layer().weight.device
        block.to(device, dtypes.pop() if len(dtypes) == 1 else torch.float32)

    def block(self, adapter_name: str) -> Tensor:
        """`D` or `B` of an adapter."""
        module: Any = self.bone_block[adapter_name]
        return module.weight

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._exact_unmerge.discard(adapter_name)

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.bone_block]
        first = next((name for name in names if self._replaces_base(name, x)), None)
        if first is None or args or kwargs:
            first, result = None, self.base_layer(x, *args, **kwargs)
        else:
            base: Any = self.get_base_layer()
            result = bat_linear(x, self.block(first), base.bias, self._read)
        for name in names:
            if name != first:
                result = self._add(name, result, x)
        return result

    def _replaces_base(self, name: str, x: Tensor) -> bool:
        """Whether `bat` may compute the base layer's product together with its own.

        Not where the base computes in its own way (quantised, hooks, autocast), the adapter's input is dropped, or
        half precision would round the update away beside the weight.
        """
        base: Any = self.get_base_layer()
        return (
            self.bone_variant[name] == "bat"
            and not (self.training and self.bone_dropout[name])
            and type(base) is nn.Linear
            and base is self.base_layer
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not hasattr(base, "_hf_hook")
            and _is_whole(base)
            and x.dtype == base.weight.dtype
            and x.dtype in _WIDE
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _add(self, name: str, result: Tensor, x: Tensor) -> Tensor:
        """`result` plus what one adapter adds."""
        x = F.dropout(x, self.bone_dropout[name], self.training)
        block = self.block(name)
        if self.bone_variant[name] != "bat":
            return add_shared(result, x, block)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return add_bat(result, x, block, self._read)

    def _read(self, dtype: torch.dtype) -> Tensor:
        """The base weight `(out, in)`, however it is stored; to be read only."""
        base: Any = self.get_base_layer()
        if type(base) is nn.Linear and _is_whole(base) and base.weight.is_floating_point():
            return base.weight.detach().to(dtype)
        with gathered([base]):
            return read_weight(base, name=self.layer_name, dtype=dtype)

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """A batch each row of which names its adapter; "__base__" is none."""
        if len(adapter_names) != len(x):
            raise UnsupportedError(
                f"adapter_names must name an adapter for each row of the batch; got {len(adapter_names)} for {len(x)}."
            )
        if self.merged:
            raise UnsupportedError("adapter_names cannot be used beside merged adapters; call unmerge_adapter first.")
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.bone_block:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result = result.index_copy(0, rows, self._add(name, result[rows], x[rows]))
        return result

    # -- merging -------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging one adapter alone adds to the base weight, in the base's own layout; at least fp32."""
        with torch.no_grad():
            block = self._wide_block(adapter)
            if self.bone_variant[adapter] == "bat":
                delta = bat_delta(self._read(block.dtype), block)
            else:
                delta = shared_delta(block, self.out_features, self.in_features)
        return delta.t() if storage_of(self.get_base_layer()).transposed else delta

    def _wide_block(self, adapter: str) -> Tensor:
        block = self.block(adapter).detach()
        if not bool(block.isfinite().all()):
            raise WeightError(
                f"The adapter {adapter!r} holds NaN or infinite values on layer {self.layer_name!r}, so it cannot be "
                "merged; use another checkpoint of it."
            )
        return block if block.dtype == torch.float64 else block.float()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight; values that are not finite are refused, `safe_merge` or not."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bone_block]
        if not names:
            return
        base = self.get_base_layer()
        with gathered([base]):
            W = self._base_weight()
            together = [*self.merged_adapters, *names]
            result = merged(W, [self._wide_block(name).to(W.dtype) for name in together])
            kept = self._kept_weight
            if kept is None and not self.merged and not self._exact_unmerge.isdisjoint(self.bone_block):
                kept = copy_weight(base)
            store(base, result, self.layer_name)
        self._kept_weight, self.merged_adapters = kept, together

    @torch.no_grad()
    def unmerge(self) -> None:
        """The base weight again: bit for bit from a kept copy (`exact_unmerge`), else within rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        with gathered([base]):
            if self._kept_weight is not None:
                put_back(base, self._kept_weight)
            else:
                store(base, self._base_weight(), self.layer_name)
        self._kept_weight, self.merged_adapters = None, []

    def _base_weight(self) -> Tensor:
        """The base weight, without the adapters that are merged into it; at least fp32."""
        base = self.get_base_layer()
        dtype = torch.float64 if storage_of(base).dtype == torch.float64 else torch.float32
        W = read_weight(base, name=self.layer_name, dtype=dtype)
        if not self.merged:
            return W
        if self._kept_weight is not None and self._kept_weight[1] is None:  # int8 scales may lie in its state
            W = dequantize(self._kept_weight[0], name=self.layer_name)
            return (W.t() if storage_of(base).transposed else W).to(dtype)
        return unmerged(W, [self._wide_block(name).to(dtype) for name in self.merged_adapters], self.layer_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.bone_variant.get(adapter_name) != "bat"

    def __repr__(self) -> str:
        return "bone." + super().__repr__()
