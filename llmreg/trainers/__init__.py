"""The side of training loops: starts from a trainer's data, and the regularisers, by a callback in any Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from .callback import RegularizerCallback
from .initialize import InitializationReport, initialize
from .tuner_losses import TunerRegularizer

if TYPE_CHECKING:
    from .trl_trainers import DPOTrainer, GRPOTrainer, SFTTrainer

__all__ = [
    "DPOTrainer",
    "GRPOTrainer",
    "InitializationReport",
    "RegularizerCallback",
    "SFTTrainer",
    "TunerRegularizer",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name in ("DPOTrainer", "GRPOTrainer", "SFTTrainer"):  # importing TRL takes seconds
        return getattr(importlib.import_module(f"{__name__}.trl_trainers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
