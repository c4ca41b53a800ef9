"""The callback that applies regularisers in an unmodified Trainer, of transformers or TRL.

A term on adapter parameters needs no forward pass and no second backward: its gradient is known in closed form. As a
decoupled step it moves the parameters once after each optimizer step. As a term of the loss it is added to each
parameter's gradient by a hook, once in the last backward pass of an accumulation window, before gradients are averaged
over ranks and clipped. Either way it acts once a step, whatever the accumulation, batch and number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers import TrainerCallback

from ..adapters import AdditiveConfig, AdditiveLayer
from ..adapters.forms import FORMS
from ..errors import UnsupportedError
from ..regularizers import OrthonormalRegularizer
from ..regularizers.orthonormal import condition_number
from ..weights import is_sharded

__all__ = ["RegularizerCallback"]

logger = logging.getLogger("llmreg")


class _Term(NamedTuple):
    """One regulariser on one adapter: `factors` are pairs of a parameter and whether its rows or columns count."""

    regularizer: OrthonormalRegularizer
    adapter: str
    layers: list[Any]
    factors: list[tuple[nn.Parameter, bool]]

    def matrices(self) -> list[Tensor]:
        """The factors as matrices whose rows should be orthonormal."""
        return [parameter.detach() if rows else parameter.detach().mT for parameter, rows in self.factors]


class RegularizerCallback(TrainerCallback):
    """Applies the regularisers that the adapters' configs ask for: `callbacks=[llmreg.RegularizerCallback()]`.

    Logs `regularizer/<name>` (its value, unweighted), `regularizer/<name>_weight` and, for the orthonormal one,
    `regularizer/condition_number` of the worst factor. Trackers receive them where this callback comes before theirs
    (recipes see to that); `trainer.state.log_history` has them in any case.

    Args:
        regularizers: apply these to every adapter with orthonormal factors (SORSA), not what its config asks for.

    Raises:
        UnsupportedError: when training begins, where a regulariser could not act as it says: no trainable parameter
            for it, sharded parameters (DeepSpeed, FSDP), or a loss term under fp16 loss scaling.
    """

    def __init__(self, regularizers: Sequence[OrthonormalRegularizer] | None = None) -> None:
        self._given = regularizers
        self._terms: list[_Term] = []
        self._hooks: list[Any] = []
        self._added: set[int] = set()
        self._directions: list[tuple[_Term, nn.Parameter, Tensor]] = []

    # -- the trainer's events --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # of a run that was interrupted
        self._terms = list(_terms(model, self._given))
        if not self._terms:
            raise UnsupportedError(
                "RegularizerCallback found no adapter with a regulariser; give the model one (SorsaConfig), or leave "
                "the callback out."
            )
        for term in self._terms:
            _check(term, args)
            for layer in term.layers:
                layer.set_regularized(term.adapter, True)
            if not term.regularizer.decoupled:
                self._hooks += [self._hook(term, parameter, rows) for parameter, rows in term.factors]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._added.clear()

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The directions of the decoupled step, where the optimizer's step starts from (the paper's update).

        Of a term in the loss every hook must have fired: the task reaches all factors, or the term none (law 3).
        """
        self._directions = [
            (term, parameter, _gradient(term, parameter, rows))
            for term in self._terms
            if term.regularizer.decoupled
            for parameter, rows in term.factors
        ]
        expected = sum(len(term.factors) for term in self._terms if not term.regularizer.decoupled)
        if len(self._added) < expected:
            raise UnsupportedError(
                f"The regulariser reached {len(self._added)} of {expected} factors at step {state.global_step}: the "
                "loss does not depend on the others; activate the adapter, or set decoupled=True."
            )

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # fp16 found an overflow
            return
        rates = _relative_rates(optimizer, args.learning_rate)
        for term, parameter, direction in self._directions:
            if id(parameter) not in rates:
                raise UnsupportedError(
                    f"The regulariser {term.regularizer.name!r} follows the learning rate of each factor, and the "
                    "optimizer lacks some; give the optimizer every parameter that requires gradients."
                )
            parameter.sub_(direction, alpha=term.regularizer.weight * rates[id(parameter)])
        self._directions = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        values = self.values()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for term in self._terms:
            for layer in term.layers:
                layer.set_regularized(term.adapter, False)
        self._terms, self._directions = [], []

    # -- what they do ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """What is logged, now; empty outside of training."""
        values: dict[str, float] = {}
        for term in self._terms:
            prefix = "regularizer/" if len(self._terms) == 1 else f"regularizer/{term.adapter}/"
            matrices = [matrix.float() for matrix in term.matrices()]
            values[f"{prefix}{term.regularizer.name}"] = float(term.regularizer.loss(matrices))
            values[f"{prefix}{term.regularizer.name}_weight"] = float(term.regularizer.weight)
            values[f"{prefix}condition_number"] = condition_number(matrices)
        return values

    def _hook(self, term: _Term, parameter: nn.Parameter, rows: bool) -> Any:
        def add(gradient: Tensor) -> Tensor:
            if not GradientState().sync_gradients or id(parameter) in self._added:
                return gradient
            self._added.add(id(parameter))
            return gradient + term.regularizer.weight * _gradient(term, parameter, rows).to(gradient.dtype)

        return parameter.register_hook(add)


def _gradient(term: _Term, parameter: nn.Parameter, rows: bool) -> Tensor:
    return term.regularizer.gradient(parameter.detach(), len(term.factors), rows=rows)


def _terms(model: Any, given: Sequence[OrthonormalRegularizer] | None) -> Iterator[_Term]:
    for name, config in getattr(model, "peft_config", {}).items():
        if not isinstance(config, AdditiveConfig) or not FORMS[config.form()].orthonormal:
            continue
        layers: list[Any] = [m for m in model.modules() if isinstance(m, AdditiveLayer) and m.form(name)]
        pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers]
        factors = [factor for A, B in pairs for factor in ((A, True), (B, False)) if factor[0].requires_grad]
        if not factors and name not in model.active_adapters:
            continue
        for regularizer in config.regularizers() if given is None else given:
            yield _Term(regularizer, name, layers, factors)


def _check(term: _Term, args: Any) -> None:
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


def _bases(term: _Term) -> list[nn.Module]:
    return [layer.lora_A[term.adapter] for layer in term.layers]


def _relative_rates(optimizer: Any, peak: float) -> dict[int, float]:
    """`lr_t / lr_peak` of each parameter; schedulers keep the peak as `initial_lr`."""
    return {
        id(parameter): group["lr"] / (group.get("initial_lr") or peak or 1.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
