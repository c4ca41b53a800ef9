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
from .callback import RegularizerCallback
from .initialize import InitializationReport, initialize
from .prompt_order import with_epochs

__all__ = ["DPOTrainer", "GRPOTrainer", "SFTTrainer"]


class _Prepared:
    """Mixin in front of a TRL trainer.

    Args:
        regularizers: applied as by `RegularizerCallback(regularizers)`; None: those that the adapters' configs ask for.
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
        callbacks = self.callback_handler.callbacks
        asked = regularizers is not None or any(
            getattr(config, "needs_regularizer", bool)() for config in getattr(self.model, "peft_config", {}).values()
        )
        if asked and not any(isinstance(callback, RegularizerCallback) for callback in callbacks):
            callbacks.insert(0, RegularizerCallback(regularizers))  # before trackers, which get what it logs

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in TRL, after the adapters that wait for data were given their start."""
        if waiting_adapters(self.model):
            self.initialization = initialize(self, **self._calibration)
        return super().train(*args, **kwargs)  # type: ignore[misc]


class SFTTrainer(_Prepared, trl.SFTTrainer):
    """`trl.SFTTrainer` with `regularizers=`, `calibration_dataset=` and `calibration=`."""


class DPOTrainer(_Prepared, trl.DPOTrainer):
    """`trl.DPOTrainer` with `regularizers=`, `calibration_dataset=` and `calibration=`."""


class GRPOTrainer(_Prepared, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with `regularizers=`, `calibration_dataset=` and `calibration=`; resumes in any epoch."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return with_epochs(super()._get_train_sampler(dataset))
