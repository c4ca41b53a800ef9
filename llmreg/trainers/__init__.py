"""The side of training loops: starts from a trainer's data, and the regularisers, by a callback in any Trainer."""

from .callback import RegularizerCallback
from .initialize import InitializationReport, initialize

__all__ = ["InitializationReport", "RegularizerCallback", "initialize"]
