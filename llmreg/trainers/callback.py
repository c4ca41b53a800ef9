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
from ..regularizers.base import Regularizer, check_term
from .factor_terms import FactorTerms, marked_layers, orthonormal_terms
from .model_parts import active_configs
from .output_terms import OutputTerms

__all__ = ["RegularizerCallback"]

#: Where a model keeps the callback that acts on it.
_ACTING = "_llmreg_regularizer_callback"


class RegularizerCallback(TrainerCallback):
    """Applies regularisers: `callbacks=[llmreg.RegularizerCallback([ConsistencyRegularizer(), ...])]`.

    Logs `regularizer/<name>` (its value, unweighted) and `regularizer/<name>_weight` (with its schedule), and what a
    term adds of its own, such as `regularizer/condition_number`. Trackers receive them where this callback comes
    before theirs (recipes see to that); `trainer.state.log_history` has them in any case.

    In a trainer that is not llmreg's the callback does not know how many tokens an accumulation window has, nor
    advantages: a term is then the mean of its micro-batches' means, as TRL averages its own added terms, and what needs
    advantages is refused. `llmreg.trainers` tell it.

    A trainer tells nobody that it was interrupted (an exception, Ctrl-C). What the callback then left on the model goes
    when a training with a callback begins, or with `callback.end()`; `llmreg.trainers` see to it themselves.

    Args:
        regularizers: apply these, the orthonormal one to every active adapter with orthonormal factors (SORSA), with
            their weights in the place of those in adapters' configs; None: what the configs of active adapters ask for.
        teacher: a model with a trained head, for the consistency of a classifier.

    Raises:
        RecipeError: something that is no regulariser.
        UnsupportedError: one twice; when training begins or at its first step, where one could not act as it says.
    """

    def __init__(self, regularizers: Sequence[Any] | None = None, *, teacher: Any = None) -> None:
        _check_given(regularizers)
        self.given, self._teacher = regularizers, teacher
        self._factors: FactorTerms | None = None
        self.outputs: OutputTerms | None = None
        self._marked: list[tuple[Any, str]] = []
        self._windows: _Windows | None = None
        self._model: Any = None
        self._state: Any = None

    # -- the trainer's events --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.end()  # of a run that was interrupted
        self._take_over(model, state)
        self._windows = _Windows(args, kwargs.get("train_dataloader"))
        given = self.given
        _check_asked(model, given)
        orthonormal = None if given is None else [one for one in given if isinstance(one, OrthonormalRegularizer)]
        factors = list(orthonormal_terms(model, orthonormal))
        others = _asked_for(model) if given is None else [one for one in given if one not in (orthonormal or [])]
        if orthonormal and not factors:
            raise _no_orthonormal_factors()
        if given is None and not factors and not others:
            raise UnsupportedError(
                "RegularizerCallback found no adapter with a regulariser; give it a list of them, or the model an "
                "adapter that asks for some (SorsaConfig, BaLoraConfig), or leave the callback out."
            )
        self._factors = FactorTerms(factors, args)
        if others:
            _check_outputs(others, args)
            temperature = float(getattr(args, "temperature", None) or 1.0)
            self.outputs = OutputTerms(model, others, temperature=temperature, teacher=self._teacher)
        self._marked = marked_layers(model)
        for layer, adapter in self._marked:
            layer.set_regularized(adapter, True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._windows is not None:
            self._windows.begin_epoch(state.global_step)

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
        self.end()

    def end(self) -> None:
        """Leave the model as it was before training; again is no matter."""
        for terms in (self._factors, self.outputs):
            if terms is not None:
                terms.remove()
        for layer, adapter in self._marked:
            layer.set_regularized(adapter, False)
        if self._model is not None:
            self._model.__dict__.pop(_ACTING, None)
        self._factors = self.outputs = self._model = self._state = None
        self._marked = []

    def _take_over(self, model: Any, state: Any) -> None:
        """Let one callback act on a model: another may be left of a run that was interrupted, and would act too."""
        other = model.__dict__.get(_ACTING)
        if other is not None and other._state is state:
            raise UnsupportedError(
                "The trainer has two RegularizerCallbacks; give one, with the regularisers of both in its list."
            )
        if other is not None:
            other.end()
        self._model, self._state = model, state
        model.__dict__[_ACTING] = self

    def values(self) -> dict[str, float]:
        """What is logged, now; empty outside of training."""
        found = [terms.values() for terms in (self._factors, self.outputs) if terms is not None]
        return {name: value for values in found for name, value in values.items()}


class _Windows:
    """Micro-batches of each accumulation window: the last one of an epoch may be shorter."""

    def __init__(self, args: Any, dataloader: Any) -> None:
        self._full, self._from_anew = args.gradient_accumulation_steps, args.ignore_data_skip
        self._first = 0
        try:
            self._batches: int | None = len(dataloader)
        except TypeError:  # a stream
            self._batches = None

    def begin_epoch(self, step: int) -> None:
        """At `step`, which after a resume stands within the epoch, or with `ignore_data_skip` at its beginning."""
        self._first = step if self._from_anew or not self._batches else step - step % self._steps

    def at(self, step: int) -> int:
        if not self._batches:
            return self._full
        rest = self._batches % self._full
        return rest if rest and (step - self._first) % self._steps == self._steps - 1 else self._full

    @property
    def _steps(self) -> int:
        return math.ceil((self._batches or 1) / self._full)


def _check_given(regularizers: Any) -> None:
    example = "such as [llmreg.regularizers.ConsistencyRegularizer(weight=0.025)]"
    if regularizers is None:
        return
    if isinstance(regularizers, str) or not isinstance(regularizers, Sequence):
        raise RecipeError(f"regularizers must be a list, {example}; got {regularizers!r}.")
    for one in regularizers:
        if isinstance(one, type):
            raise RecipeError(f"{one.__name__} is a class and no regulariser; write {one.__name__}().")
        if not isinstance(one, OrthonormalRegularizer | Regularizer):
            raise RecipeError(f"{one!r} is no regulariser; give a list of them, {example}.")
        if not isinstance(one, OrthonormalRegularizer):
            check_term(one)
    _check_once([one.name for one in regularizers])


def _check_once(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedError(f"The regulariser {twice[0]!r} is there twice; give one, with the weight of both.")


def _check_asked(model: Any, given: Sequence[Any] | None) -> None:
    """A list that leaves out what a config asks for would switch that off in silence."""
    if given is None:
        return
    for name, config in active_configs(model).items():
        asked = [one.name for one in config.regularizers()] if hasattr(config, "regularizers") else []
        missing = [one for one in asked if one not in [other.name for other in given]]
        if missing:
            raise UnsupportedError(
                f"The config of adapter {name!r} asks for {', '.join(missing)}, and the regularisers that were given "
                "leave it out; list it too, or switch it off in the config (its weight 0; weights=None: the start "
                "only)."
            )


def _asked_for(model: Any) -> list[Regularizer]:
    """The output terms that active adapters' configs ask for."""
    configs = [config for config in active_configs(model).values() if hasattr(config, "regularizers")]
    asked = [one for config in configs for one in config.regularizers()]
    return [one for one in asked if not isinstance(one, OrthonormalRegularizer)]


def _check_outputs(regularizers: Sequence[Regularizer], args: Any) -> None:
    names = [one.name for one in regularizers]
    _check_once(names)
    cannot = f"The regularisers {', '.join(names)} cannot act: "
    if args.fp16:
        raise UnsupportedError(
            f"{cannot}fp16 scales the loss that their gradients are added to; train in bf16 or float32."
        )
    if getattr(args, "use_liger_kernel", False):
        raise UnsupportedError(f"{cannot}Liger's fused loss passes by the model's output; set use_liger_kernel=False.")
    if getattr(args, "n_gpu", 1) > 1:
        raise UnsupportedError(
            f"{cannot}one process with {args.n_gpu} GPUs copies the model to each (DataParallel); start one process "
            "for each GPU (accelerate launch, torchrun), or show it a single one (CUDA_VISIBLE_DEVICES=0)."
        )


def _no_orthonormal_factors() -> UnsupportedError:
    return UnsupportedError(
        "RegularizerCallback found no adapter whose factors start orthonormal, which the orthonormal regulariser is "
        "for (SorsaConfig, EvaConfig); give it target='initial_gram' for factors like PiSSA's, or leave it out."
    )
