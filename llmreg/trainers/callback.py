"""The callback that applies regularisers in an unmodified Trainer, of transformers or TRL.

Two kinds of terms, two mechanisms: those on adapter factors, whose gradient is known in closed form (`factor_terms`),
and those on what the model puts out (`output_terms`). Both act exactly as much as their weights say, whatever the
accumulation, the batches and the number of processes, and leave the loss that is reported, and evaluation, alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ..errors import RecipeError, UnsupportedError
from ..regularizers import OrthonormalRegularizer
from ..regularizers.base import Regularizer
from .factor_terms import FactorTerms, marked_layers, orthonormal_terms
from .output_terms import OutputTerms

__all__ = ["RegularizerCallback"]


class RegularizerCallback(TrainerCallback):
    """Applies regularisers: `callbacks=[llmreg.RegularizerCallback([ConsistencyRegularizer(), ...])]`.

    Logs `regularizer/<name>` (its value, unweighted) and `regularizer/<name>_weight` (with its schedule), and what a
    term adds of its own, such as `regularizer/condition_number`. Trackers receive them where this callback comes
    before theirs (recipes see to that); `trainer.state.log_history` has them in any case.

    In a trainer that is not llmreg's the callback does not know how many tokens an accumulation window has, nor
    advantages: a term is then the mean of its micro-batches' means, as TRL averages its own added terms, and what needs
    advantages is refused. `llmreg.trainers` tell it.

    Args:
        regularizers: apply these, the orthonormal one to every adapter with orthonormal factors (SORSA); None: what the
            adapters' configs ask for.
        teacher: a model with a trained head, for the consistency of a classifier.

    Raises:
        RecipeError: something that is no regulariser.
        UnsupportedError: when training begins or at its first step, where a regulariser could not act as it says.
    """

    def __init__(self, regularizers: Sequence[Any] | None = None, *, teacher: Any = None) -> None:
        for one in regularizers or ():
            if not isinstance(one, OrthonormalRegularizer | Regularizer):
                raise RecipeError(
                    f"{one!r} is no regulariser; give a list of them, such as [llmreg.regularizers."
                    "ConsistencyRegularizer(weight=0.025)]."
                )
        self.given, self._teacher = regularizers, teacher
        self._factors: FactorTerms | None = None
        self.outputs: OutputTerms | None = None
        self._marked: list[tuple[Any, str]] = []
        self._windows: _Windows | None = None

    # -- the trainer's events --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # of a run that was interrupted
        self._windows = _Windows(args, kwargs.get("train_dataloader"))
        given = self.given
        orthonormal = None if given is None else [one for one in given if isinstance(one, OrthonormalRegularizer)]
        factors = list(orthonormal_terms(model, orthonormal))
        others = _asked_for(model) if given is None else [one for one in given if one not in (orthonormal or [])]
        if orthonormal and not factors:
            raise _no_orthonormal_factors()
        if not factors and not others:
            raise UnsupportedError(
                "RegularizerCallback found no adapter with a regulariser; give the model one (SorsaConfig), or leave "
                "the callback out."
            )
        self._factors = FactorTerms(factors, args)
        if others:
            _check_outputs(others, args)
            temperature = float(getattr(args, "temperature", None) or 1.0)
            self.outputs = OutputTerms(
                model,
                others,
                temperature=temperature,
                teacher=self._teacher,
                probing=self._factors.suspended,
            )
        self._marked = marked_layers(model, factors)
        for layer, adapter in self._marked:
            layer.set_regularized(adapter, True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._factors is not None:
            self._factors.begin_step()
        if self.outputs is not None and self._windows is not None:
            self.outputs.begin_step(state.global_step / max(1, state.max_steps), self._windows.at(state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._factors is not None:
            self._factors.before_optimizer_step(state.global_step)
        if self.outputs is not None:
            self.outputs.before_optimizer_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._factors is not None:
            self._factors.after_optimizer_step(optimizer, args.learning_rate)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        values = self.values()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for terms in (self._factors, self.outputs):
            if terms is not None:
                terms.remove()
        for layer, adapter in self._marked:
            layer.set_regularized(adapter, False)
        self._factors = self.outputs = None
        self._marked = []

    def values(self) -> dict[str, float]:
        """What is logged, now; empty outside of training."""
        found = [terms.values() for terms in (self._factors, self.outputs) if terms is not None]
        return {name: value for values in found for name, value in values.items()}


class _Windows:
    """Micro-batches of each accumulation window: the last one of an epoch may be shorter."""

    def __init__(self, args: Any, dataloader: Any) -> None:
        self._full = args.gradient_accumulation_steps
        try:
            self._batches: int | None = len(dataloader)
        except TypeError:  # a stream
            self._batches = None

    def at(self, step: int) -> int:
        if not self._batches:
            return self._full
        steps = math.ceil(self._batches / self._full)
        rest = self._batches % self._full
        return rest if rest and step % steps == steps - 1 else self._full


def _asked_for(model: Any) -> list[Regularizer]:
    """The output terms that adapters' configs ask for."""
    configs = getattr(model, "peft_config", {}).items()
    asked = [config.regularizers() for name, config in configs if hasattr(config, "regularizers")]
    return [one for found in asked for one in found if not isinstance(one, OrthonormalRegularizer)]


def _check_outputs(regularizers: Sequence[Regularizer], args: Any) -> None:
    names = [one.name for one in regularizers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedError(f"The regulariser {twice[0]!r} is there twice; give one, with the weight of both.")
    if args.fp16:
        raise UnsupportedError(
            f"The regularisers {', '.join(names)} cannot act: fp16 scales the loss that their gradients are added to; "
            "train in bf16 or float32."
        )
    if getattr(args, "use_liger_kernel", False):
        raise UnsupportedError(
            f"The regularisers {', '.join(names)} cannot act: Liger's fused loss passes by the model's output; set "
            "use_liger_kernel=False."
        )


def _no_orthonormal_factors() -> UnsupportedError:
    return UnsupportedError(
        "RegularizerCallback found no adapter whose factors start orthonormal, which the orthonormal regulariser is "
        "for (SorsaConfig, EvaConfig); give it target='initial_gram' for factors like PiSSA's, or leave it out."
    )
