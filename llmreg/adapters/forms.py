"""What an additive adapter holds on a layer, and what it adds to the layer's output: one class a form.

| form | trained | frozen | adds | saved as LoRA of rank |
|---|---|---|---|---|
| `Difference` (PiSSA) | `A`, `B` | `A0`, `B0` | `s (B A - B0 A0) x` | 2r |
| `ScaledDifference` (SORSA) | `A`, `S`, `B` | `A0`, `S0`, `B0` | `s (B diag(S) A - B0 diag(S0) A0) x` | 2r |
| `Spectral` (SVFit) | `S`, the change of `S0` | `A0 = V^T`, `B0 = U`, `S0` | `s B0 diag(S) A0 x` | r |
| `Product` (EoRA, QPiSSA) | `A`, `B` | `A0`, `B0` | `s B A x` | r |
| `ScaledProduct` (SORSA beside a quantised residual) | `A`, `S`, `B` | `A0`, `S0`, `B0` | `s B diag(S) A x` | r |
| `Projection` (EVA) | `A`, `B`, from zero | `A0` | `s B A x` | r |

A layer keeps each in a container of its own (`lora_A`, `lora_S0`, ...), keyed by adapter, as PEFT does. PEFT calls a
form through its hook for adapters whose forward is not `B A x`, a `LoraVariant`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from ..initializers import Factors
from .difference import add_difference, concatenate
from .spectral import add_spectral

__all__ = [
    "CONTAINERS",
    "FORMS",
    "Difference",
    "Factor",
    "Form",
    "Product",
    "Projection",
    "ScaledDifference",
    "ScaledProduct",
    "Spectral",
]

#: Where a layer keeps its factors; the first two are PEFT's.
CONTAINERS = ("lora_A", "lora_B", "lora_S", "lora_A0", "lora_B0", "lora_S0")


class Factor(nn.Module):
    """One factor, as `weight`: `lora_A[...]` of PEFT's layers is a module. Left unset: no random number is drawn."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class _Shown(nn.Module):
    """Stands where PEFT looks for a factor (`lora_A[...].weight`), and shows one that lies elsewhere."""

    def __init__(self, factor: Factor) -> None:
        super().__init__()
        self._factor = (factor,)  # not registered a second time

    @property
    def weight(self) -> Tensor:
        return self._factor[0].weight


class Form(LoraVariant):
    """Base of the forms. Stateless: everything lies on the layer."""

    trained: ClassVar[tuple[str, ...]]
    frozen: ClassVar[tuple[str, ...]]
    #: Whether `dtype` is final; else PEFT turns half precision into float32 afterwards.
    own_dtypes: ClassVar[bool] = False
    #: The trained factors that start orthonormal: the rows of `A`, the columns of `B`.
    orthonormal: ClassVar[tuple[str, ...]] = ()
    #: Whether the adapter adds exactly nothing at its start.
    starts_at_zero: ClassVar[bool] = True

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to do: factors are set by the tuner, once all layers are in place."""

    @classmethod
    def containers(cls) -> tuple[str, ...]:
        """All containers in which an adapter of this form has an entry."""
        return cls.trained + cls.frozen

    @classmethod
    def make(cls, layer: Any, name: str, rank: int) -> None:
        """(Re)make an adapter's factors on a layer, unset."""
        shapes = {"A": (rank, layer.in_features), "B": (layer.out_features, rank), "S": (rank,)}
        for container in cls.containers():
            factor = Factor(*shapes[container.removeprefix("lora_")[0]])
            getattr(layer, container)[name] = factor.requires_grad_(container in cls.trained)

    @classmethod
    def dtype(cls, base: nn.Module, container: str) -> torch.dtype | None:
        """What a new adapter keeps a factor in; None: as it was made."""
        dtype: torch.dtype = base.weight.dtype  # type: ignore[assignment]
        return dtype if dtype.is_floating_point else None

    @classmethod
    def settle_dtypes(cls, layer: Any, name: str) -> None:
        """Let the frozen start take the dtype of the factors that train.

        TRL casts only parameters that require gradients (to bf16 on a quantised base). The same dtype means the same
        rounding, so that the difference stays zero at step 0.
        """

    @classmethod
    def clear(cls, layer: Any, name: str) -> None:
        """Zero all factors of an adapter that waits for its start: whatever its form, it then adds exactly nothing."""
        for container in cls.containers():
            getattr(layer, container)[name].weight.zero_()

    @classmethod
    def set_start(cls, layer: Any, name: str, start: Factors) -> None:
        """Put an adapter at (or back at) its start: it then adds exactly nothing, if `starts_at_zero`."""
        raise NotImplementedError

    @classmethod
    def start(cls, layer: Any, name: str) -> Factors:
        """The start that an adapter was given, as `set_start` takes it."""
        raise NotImplementedError

    @classmethod
    def low_rank(cls, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`down (R, in)`, `up (out, R)` of the plain LoRA that computes the same, from tensors by container."""
        raise NotImplementedError

    # -- PEFT's hooks -------------------------------------------------------------------------------------------------

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


class Difference(Form):
    """PiSSA and every other method that moves the two factors of a start."""

    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    frozen: ClassVar[tuple[str, ...]] = ("lora_A0", "lora_B0")

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        module.check_trainable(active_adapter)
        A, B, A0, B0 = module.factors(active_adapter).values()
        return add_difference(result, x, A, B, A0, B0, module.scaling[active_adapter])

    @classmethod
    def settle_dtypes(cls, layer: Any, name: str) -> None:
        for frozen in cls.frozen:
            trained = frozen.removesuffix("0")
            start, factor = getattr(layer, frozen)[name].weight, getattr(layer, trained)[name].weight
            if start.dtype != factor.dtype:
                start.data = start.data.to(factor.dtype)

    @classmethod
    def set_start(cls, layer: Any, name: str, start: Factors) -> None:
        for container, value in zip(cls.containers(), cls._parts(start) * 2, strict=True):
            getattr(layer, container)[name].weight.copy_(value)

    @classmethod
    def _parts(cls, start: Factors) -> tuple[Tensor, ...]:
        return start.A, start.B

    @classmethod
    def start(cls, layer: Any, name: str) -> Factors:
        A, B = layer.lora_A0[name].weight, layer.lora_B0[name].weight
        return Factors(A, B, A.new_empty(0))

    @classmethod
    def low_rank(cls, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return concatenate(*(tensors[name] for name in ("lora_A", "lora_B", "lora_A0", "lora_B0")))


class ScaledDifference(Difference):
    """SORSA: the singular values are a third factor."""

    trained = ("lora_A", "lora_B", "lora_S")
    frozen = ("lora_A0", "lora_B0", "lora_S0")
    orthonormal = ("lora_A", "lora_B")

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        module.check_trainable(active_adapter)
        A, B, S, A0, B0, S0 = module.factors(active_adapter).values()
        return add_difference(result, x, A, B, A0, B0, module.scaling[active_adapter], S, S0)

    @classmethod
    def _parts(cls, start: Factors) -> tuple[Tensor, ...]:
        return start.A, start.B, start.singular_values

    @classmethod
    def start(cls, layer: Any, name: str) -> Factors:
        return Factors(*(getattr(layer, container)[name].weight for container in cls.frozen))

    @classmethod
    def low_rank(cls, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return concatenate(*(tensors[f"lora_{name}"] for name in ("A", "B", "A0", "B0", "S", "S0")))


class Spectral(Form):
    """SVFit: only the singular values move; the singular vectors stay, in the base's dtype."""

    trained = ("lora_S",)
    frozen = ("lora_A0", "lora_B0", "lora_S0")
    own_dtypes = True

    @classmethod
    def make(cls, layer: Any, name: str, rank: int) -> None:
        super().make(layer, name, rank)
        for shown in ("lora_A", "lora_B"):  # PEFT takes what lies there for trainable
            getattr(layer, shown)[name] = _Shown(getattr(layer, f"{shown}0")[name])

    @classmethod
    def dtype(cls, base: nn.Module, container: str) -> torch.dtype | None:
        """The vectors in the base's dtype (what it computes in, if it is quantised), the values in float32."""
        if container in ("lora_S", "lora_S0"):
            return torch.float32
        dtype: torch.dtype = base.weight.dtype  # type: ignore[assignment]
        if dtype.is_floating_point:
            return dtype
        return getattr(base, "compute_dtype", None) or torch.float32

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        S, A0, B0, _ = module.factors(active_adapter).values()
        return add_spectral(result, x, A0, B0, S, module.scaling[active_adapter])

    @classmethod
    def set_start(cls, layer: Any, name: str, start: Factors) -> None:
        errors = []
        for container, value in zip(cls.frozen, (start.A, start.B, start.singular_values), strict=True):
            weight = getattr(layer, container)[name].weight
            weight.copy_(value)
            errors.append(float((weight.to(value) - value).norm() / value.norm().clamp_min(1e-30)))
        layer.vector_error[name] = max(errors)
        layer.lora_S[name].weight.zero_()

    @classmethod
    def start(cls, layer: Any, name: str) -> Factors:
        return Factors(*(getattr(layer, container)[name].weight for container in cls.frozen))

    @classmethod
    def low_rank(cls, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        A0, B0, S = (tensors[name] for name in ("lora_A0", "lora_B0", "lora_S"))
        return A0, B0 * S  # in the wider of the two dtypes


def _follow_original(layer: Any, name: str) -> None:
    """Let a copy beside one residual (TRL's reference) take the dtype of its original.

    TRL casts what trains, after it was copied. A difference is zero in any dtype; a product is only rounded alike, so
    that the policy begins as its reference to the last bit, in the same one.
    """
    original = layer.residual_copy.get(name)
    if original is None or original not in layer.lora_A:
        return
    for container in layer.form(name).trained:
        mine, theirs = (getattr(layer, container)[adapter].weight for adapter in (name, original))
        if mine.dtype != theirs.dtype:
            mine.data = mine.data.to(theirs.dtype)


def _as(x: Tensor, A: Tensor) -> Tensor:
    """The input in the dtype of the factors, where autocast does not choose one."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)


class Product(Difference):
    """A plain LoRA that begins somewhere else: EoRA's makes up for quantisation from the first step on, QPiSSA's for
    what the quantised residual lacks."""

    starts_at_zero = False

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        module.check_trainable(active_adapter)
        A, B, *_ = module.factors(active_adapter).values()
        hidden = F.linear(module.lora_dropout[active_adapter](_as(x, A)), A)
        return result + F.linear(hidden, B) * module.scaling[active_adapter]

    @classmethod
    def settle_dtypes(cls, layer: Any, name: str) -> None:
        _follow_original(layer, name)
        super().settle_dtypes(layer, name)

    @classmethod
    def low_rank(cls, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["lora_A"], tensors["lora_B"]


class ScaledProduct(ScaledDifference):
    """As `Product`, with the singular values as a third factor."""

    starts_at_zero = False

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        module.check_trainable(active_adapter)
        A, B, S, *_ = module.factors(active_adapter).values()
        return result + F.linear(F.linear(_as(x, A), A) * S, B) * module.scaling[active_adapter]

    @classmethod
    def settle_dtypes(cls, layer: Any, name: str) -> None:
        _follow_original(layer, name)
        super().settle_dtypes(layer, name)

    @classmethod
    def low_rank(cls, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["lora_A"], tensors["lora_B"] * tensors["lora_S"]


class Projection(Product):
    """EVA: `A` starts at the inputs' principal components, `B` at zero, so that only `A0` need be kept."""

    frozen = ("lora_A0",)
    starts_at_zero = True
    orthonormal = ("lora_A",)

    @classmethod
    def set_start(cls, layer: Any, name: str, start: Factors) -> None:
        for container in ("lora_A", "lora_A0"):
            getattr(layer, container)[name].weight.copy_(start.A)
        layer.lora_B[name].weight.zero_()

    @classmethod
    def start(cls, layer: Any, name: str) -> Factors:
        A = layer.lora_A0[name].weight
        return Factors(A, A.new_zeros(layer.out_features, len(A)), A.new_empty(0))


#: The form of a config, by its `form()`.
FORMS: dict[str, type[Form]] = {
    "difference": Difference,
    "scaled difference": ScaledDifference,
    "spectral": Spectral,
    "product": Product,
    "projection": Projection,
    "scaled product": ScaledProduct,
}
