"""Terms on adapter factors whose gradient is known in closed form: they need no forward pass and no second backward.

As a decoupled step such a term moves the parameters once after each optimizer step. As a term of the loss it is added
to each parameter's gradient by a hook, once in the last backward pass of an accumulation window, before gradients are
averaged over ranks and clipped. Either way it acts once a step, whatever the accumulation, batch and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from ..adapters import AdditiveConfig, AdditiveLayer
from ..adapters.forms import FORMS
from ..errors import UnsupportedError
from ..regularizers import OrthonormalRegularizer
from ..regularizers.orthonormal import condition_number
from ..weights import is_sharded
from .model_parts import active_configs

__all__ = ["FactorTerm", "FactorTerms", "marked_layers", "orthonormal_terms", "regularized_factors"]


class TrainedFactor(NamedTuple):
    """A parameter, whether its rows or its columns count, and what their Gram matrix should be (None: identity)."""

    parameter: nn.Parameter
    rows: bool
    target: Tensor | None


class FactorTerm(NamedTuple):
    """One regulariser on one adapter."""

    regularizer: OrthonormalRegularizer
    adapter: str
    layers: list[Any]
    factors: list[TrainedFactor]

    def matrices(self) -> list[Tensor]:
        """The factors as matrices whose rows count."""
        return [one.parameter.detach() if one.rows else one.parameter.detach().mT for one in self.factors]

    def gradient(self, factor: TrainedFactor) -> Tensor:
        return self.regularizer.gradient(
            factor.parameter.detach(), len(self.factors), rows=factor.rows, target=factor.target
        )

    def value(self, matrices: Sequence[Tensor]) -> float:
        return float(self.regularizer.loss(matrices, [factor.target for factor in self.factors]))


class FactorTerms:
    """The factor terms of one training.

    Raises:
        UnsupportedError: one could not act as it says: no trainable parameter for it, sharded parameters (DeepSpeed,
            FSDP), or a loss term under fp16 loss scaling.
    """

    def __init__(self, terms: Sequence[FactorTerm], args: Any) -> None:
        self.terms = list(terms)
        self._hooks: list[Any] = []
        self._added: set[int] = set()
        self._suspended = False
        self._directions: list[tuple[FactorTerm, nn.Parameter, Tensor]] = []
        for term in self.terms:
            _check(term, args)
            if not term.regularizer.decoupled:
                self._hooks += [self._hook(term, factor) for factor in term.factors]

    def begin_step(self) -> None:
        self._added.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Gradients that are taken in this context are not the loss's; hooks of parameters fire for them too."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    @torch.no_grad()
    def before_optimizer_step(self, step: int) -> None:
        """The directions of the decoupled step, where the optimizer's step starts from (the paper's update).

        Of a term in the loss every hook must have fired: the task reaches all factors, or the term none (law 3).
        """
        self._directions = [
            (term, factor.parameter, term.gradient(factor))
            for term in self.terms
            if term.regularizer.decoupled
            for factor in term.factors
        ]
        expected = sum(len(term.factors) for term in self.terms if not term.regularizer.decoupled)
        if len(self._added) < expected:
            raise UnsupportedError(
                f"The regulariser reached {len(self._added)} of {expected} factors at step {step}: the loss does not "
                "depend on the others; activate the adapter, or set decoupled=True."
            )

    @torch.no_grad()
    def after_optimizer_step(self, optimizer: Any, peak: float) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # fp16 found an overflow
            return
        rates = _relative_rates(optimizer, peak)
        for term, parameter, direction in self._directions:
            if id(parameter) not in rates:
                raise UnsupportedError(
                    f"The regulariser {term.regularizer.name!r} follows the learning rate of each factor, and the "
                    "optimizer lacks some; give the optimizer every parameter that requires gradients."
                )
            parameter.sub_(direction, alpha=term.regularizer.weight * rates[id(parameter)])
        self._directions = []

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """What is logged, now."""
        values: dict[str, float] = {}
        for term in self.terms:
            prefix = "regularizer/" if len(self.terms) == 1 else f"regularizer/{term.adapter}/"
            matrices = [matrix.float() for matrix in term.matrices()]
            values[f"{prefix}{term.regularizer.name}"] = term.value(matrices)
            values[f"{prefix}{term.regularizer.name}_weight"] = float(term.regularizer.weight)
            values[f"{prefix}condition_number"] = condition_number(matrices)
        return values

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, term: FactorTerm, factor: TrainedFactor) -> Any:
        def add(gradient: Tensor) -> Tensor:
            added = id(factor.parameter) in self._added
            if added or self._suspended or not GradientState().sync_gradients:
                return gradient
            self._added.add(id(factor.parameter))
            return gradient + term.regularizer.weight * term.gradient(factor).to(gradient.dtype)

        return factor.parameter.register_hook(add)


def orthonormal_terms(model: Any, given: Sequence[OrthonormalRegularizer] | None) -> Iterator[FactorTerm]:
    """`given` on every active adapter that has such factors; None: what each adapter's config asks for."""
    for name, config in active_configs(model).items():
        if not isinstance(config, AdditiveConfig):
            continue
        layers: list[Any] = [m for m in model.modules() if isinstance(m, AdditiveLayer) and m.form(name)]
        asked = [one for one in config.regularizers() if isinstance(one, OrthonormalRegularizer)]
        for regularizer in asked if given is None else given:
            names = regularized_factors(config, regularizer)
            factors = [one for layer in layers for one in _factors(layer, name, names, regularizer)]
            if names:
                yield FactorTerm(regularizer, name, layers, factors)


def regularized_factors(config: AdditiveConfig, regularizer: OrthonormalRegularizer) -> tuple[str, ...]:
    """The containers of an adapter's trained factors that the regulariser is about."""
    form = FORMS[config.form()]
    if regularizer.target == "identity":
        return form.orthonormal
    return tuple(name for name in ("lora_A", "lora_B") if name in form.trained and f"{name}0" in form.frozen)


def _factors(
    layer: Any, adapter: str, names: Sequence[str], regularizer: OrthonormalRegularizer
) -> Iterator[TrainedFactor]:
    for name in names:
        parameter, rows = getattr(layer, name)[adapter].weight, name == "lora_A"
        if parameter.requires_grad:
            target = None
            if regularizer.target == "initial_gram":
                start = getattr(layer, f"{name}0")[adapter].weight.detach()
                start = (start if rows else start.mT).to(torch.promote_types(start.dtype, torch.float32))
                target = start @ start.mT
            yield TrainedFactor(parameter, rows, target)


def marked_layers(model: Any) -> list[tuple[Any, str]]:
    """Layers with an adapter that refuses to train until the regularisers that its config asks for act."""
    asking = [name for name, config in active_configs(model).items() if _asks(config)]
    layers = [module for module in model.modules() if isinstance(module, AdditiveLayer)]
    return [(layer, name) for layer in layers for name in asking if layer.form(name)]


def _asks(config: Any) -> bool:
    return isinstance(config, AdditiveConfig) and config.needs_regularizer()


def _check(term: FactorTerm, args: Any) -> None:
    refusals: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: not term.factors, f"no factor of adapter {term.adapter!r} is trainable"),
        (
            lambda: bool(getattr(args, "deepspeed", None)) or any(is_sharded(layer) for layer in _bases(term)),
            "DeepSpeed and FSDP keep parameters in shards, which it does not gather; train with DDP or one process",
        ),
        (
            lambda: args.fp16 and not term.regularizer.decoupled,
            "fp16 scales gradients; train in bf16, or set decoupled=True",
        ),
    )
    for applies, reason in refusals:
        if applies():
            raise UnsupportedError(f"The regulariser {term.regularizer.name!r} cannot act: {reason}.")


def _bases(term: FactorTerm) -> list[nn.Module]:
    return [layer.lora_A[term.adapter] for layer in term.layers]


def _relative_rates(optimizer: Any, peak: float) -> dict[int, float]:
    """`lr_t / lr_peak` of each parameter; schedulers keep the peak as `initial_lr`."""
    return {
        id(parameter): group["lr"] / (group.get("initial_lr") or peak or 1.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
