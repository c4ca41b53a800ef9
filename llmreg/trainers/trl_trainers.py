"""TRL's trainers, which start adapters from data before the first step and apply regularisers.

    trainer = SFTTrainer(model, args=args, train_dataset=rows, peft_config=llmreg.EvaConfig(r=16))
    trainer.train()

Everything else is TRL's. What these two lines of convenience do can be had with TRL's own classes too:
`llmreg.initialize(trainer)` and `callbacks=[llmreg.RegularizerCallback()]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trl

from ..adapters.data_start import waiting_adapters
from ..errors import RecipeError
from ..regularizers import LowProbabilityRegularizer
from ..regularizers.low_probability import PROXY, THRESHOLD
from .callback import RegularizerCallback
from .hardness import HardnessWeighting
from .initialize import InitializationReport, initialize
from .low_probability import LowProbabilityPreparation, check_grpo
from .model_parts import active_configs
from .output_terms import Batch
from .prompt_order import with_epochs

__all__ = ["DPOTrainer", "GRPOTrainer", "SFTTrainer"]


class _Prepared:
    """Mixin in front of a TRL trainer.

    Args:
        regularizers: applied as by `RegularizerCallback(regularizers)`; None: those that the adapters' configs ask for,
            or those of a `RegularizerCallback` among `callbacks`.
        calibration_dataset: rows in TRL's formats for adapters that start from data; None: the training set.
        calibration: further arguments of `llmreg.initialize`, such as `{"samples": 64, "memory_budget": 2**30}`.

    Attributes:
        initialization: the report of `llmreg.initialize`; None where no adapter starts from data, or before `train`.
    """

    initialization: InitializationReport | None = None

    def __init__(
        self: Any,
        *args: Any,
        regularizers: Sequence[Any] | None = None,
        calibration_dataset: Any = None,
        calibration: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._calibration = {"calibration_dataset": calibration_dataset, **(calibration or {})}
        if regularizers is not None:
            self.use_regularizers(RegularizerCallback(regularizers))
        elif self._regularizer_callback is not None:
            self._check_regularizers(self._regularizer_callback)

    def use_regularizers(self: Any, callback: RegularizerCallback) -> None:
        """Apply this callback's regularisers, before trackers, which get what it logs.

        Raises:
            RecipeError: the trainer has regularisers already.
        """
        if self._regularizer_callback is not None:
            raise RecipeError(
                "The trainer has regularisers already, from regularizers= or a RegularizerCallback; give all of them "
                "in one list."
            )
        self._check_regularizers(callback)
        self.callback_handler.callbacks.insert(0, callback)

    def add_callback(self: Any, callback: Any) -> None:
        """As in TRL; a `RegularizerCallback` is used as `regularizers=` are."""
        if callback is RegularizerCallback:
            callback = RegularizerCallback()
        if isinstance(callback, RegularizerCallback):
            self.use_regularizers(callback)
        else:
            super().add_callback(callback)  # type: ignore[misc]

    def _check_regularizers(self, callback: RegularizerCallback) -> None:
        """Refuse what could not act beside this trainer's loss."""

    @property
    def _regularizer_callback(self: Any) -> RegularizerCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((one for one in callbacks if isinstance(one, RegularizerCallback)), None)

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in TRL, after the adapters that wait for data were given their start."""
        if waiting_adapters(self.model):
            self.initialization = initialize(self, **self._calibration)
        configs = active_configs(self.model).values()
        asked = any(getattr(config, "needs_regularizer", bool)() for config in configs)
        if asked and self._regularizer_callback is None:
            self.use_regularizers(RegularizerCallback())
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._regularizer_callback is not None:
                self._regularizer_callback.end()  # where training was interrupted too

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in TRL; the regularisers learn what the micro-batch is a part of."""
        terms = self._regularizer_callback and self._regularizer_callback.outputs
        if terms is None or not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        terms.batch = self._batch(inputs, kwargs.get("num_items_in_batch"))
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            terms.batch = None

    def _batch(self: Any, inputs: Any, items: Any) -> Batch:
        tokens = items
        if items is not None and self.args.average_tokens_across_devices:
            tokens = items / self.accelerator.num_processes
        return Batch(self.current_gradient_accumulation_steps, tokens)


class SFTTrainer(_Prepared, trl.SFTTrainer):
    """`trl.SFTTrainer` with `regularizers=`, `calibration_dataset=` and `calibration=`."""


class DPOTrainer(_Prepared, trl.DPOTrainer):
    """`trl.DPOTrainer` with `regularizers=`, `calibration_dataset=` and `calibration=`."""

    def _batch(self, inputs: Any, items: Any) -> Batch:
        return Batch(self.current_gradient_accumulation_steps)  # its loss is a mean of micro-batches' means too


class GRPOTrainer(_Prepared, HardnessWeighting, LowProbabilityPreparation, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with `regularizers=`, `calibration_dataset=`, `calibration=` and `hardness_weighting=`.

    It resumes in any epoch.

    Args:
        hardness_weighting: policy-specific hardness weighting of advantages, see `llmreg.trainers.hardness`.
    """

    def __init__(self, *args: Any, hardness_weighting: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if hardness_weighting:
            self._weigh_by_hardness()

    def _batch(self, inputs: Any, items: Any) -> Batch:
        window = self.current_gradient_accumulation_steps
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        mask = inputs["completion_mask"]
        return Batch(
            window,
            tokens * window / self.args.steps_per_generation,  # of the generation batch, as TRL's own token mean
            advantages=inputs["advantages"],
            old_log_probs=inputs.get("old_per_token_logps"),
            mask=mask * inputs["tool_mask"] if "tool_mask" in inputs else mask,
            extra={name: inputs[name] for name in (THRESHOLD, PROXY) if name in inputs},
        )

    def _check_regularizers(self, callback: RegularizerCallback) -> None:
        if any(isinstance(one, LowProbabilityRegularizer) for one in callback.given or ()):
            check_grpo(self.args)

    @property
    def _regularizers(self) -> Sequence[Any]:
        callback = self._regularizer_callback
        return () if callback is None else callback.given or ()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return with_epochs(super()._get_train_sampler(dataset))
