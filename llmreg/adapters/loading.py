"""What an adapter that is being made, loaded or saved must know, handed past PEFT's own calls in context variables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from ..calibration import Statistics

__all__ = [
    "checking_start",
    "current_statistics",
    "exact_factors",
    "expected_start",
    "is_saving",
    "saved_factors",
    "saving",
    "starts",
    "use_statistics",
    "without_start",
]

_WITHOUT_START: ContextVar[bool] = ContextVar("llmreg_without_start", default=False)
_SAVED_FACTORS: ContextVar[dict[str, Tensor] | None] = ContextVar("llmreg_saved_factors", default=None)
_STATISTICS: ContextVar[Sequence[Statistics]] = ContextVar("llmreg_statistics", default=())
_SAVING: ContextVar[bool] = ContextVar("llmreg_saving", default=False)
_EXPECTED_START: ContextVar[dict[str, Tensor] | None] = ContextVar("llmreg_expected_start", default=None)


@contextmanager
def without_start() -> Iterator[None]:
    """Adapters injected in this context keep unset factors: what follows loads them."""
    token = _WITHOUT_START.set(True)
    try:
        yield
    finally:
        _WITHOUT_START.reset(token)


def starts() -> bool:
    """Whether an adapter that is injected now must be given its start."""
    return not _WITHOUT_START.get()


@contextmanager
def use_statistics(*statistics: Statistics) -> Iterator[None]:
    """Adapters injected in this context that start from data (EVA, CorDA, EoRA) take these statistics, gathered before
    by `llmreg.calibration.calibrate` under the layers' names in the base model; no `llmreg.initialize` is needed."""
    token = _STATISTICS.set(statistics)
    try:
        yield
    finally:
        _STATISTICS.reset(token)


def current_statistics() -> Sequence[Statistics]:
    """The statistics of the surrounding `use_statistics`; empty if there are none."""
    return _STATISTICS.get()


@contextmanager
def saved_factors(factors: dict[str, Tensor] | None) -> Iterator[None]:
    """An adapter loaded in this context takes its factors bit-exactly from here (live names, without the adapter's
    name), not from the difference form it is stored in."""
    token = _SAVED_FACTORS.set(factors)
    try:
        yield
    finally:
        _SAVED_FACTORS.reset(token)


def exact_factors() -> dict[str, Tensor] | None:
    """The factors of the surrounding `saved_factors`, if any."""
    return _SAVED_FACTORS.get()


@contextmanager
def checking_start(checks: dict[str, Tensor]) -> Iterator[None]:
    """An adapter injected in this context is refused unless its start passes these checks (`tiny`)."""
    token = _EXPECTED_START.set(checks)
    try:
        yield
    finally:
        _EXPECTED_START.reset(token)


def expected_start() -> dict[str, Tensor] | None:
    """The checks of the surrounding `checking_start`, if any."""
    return _EXPECTED_START.get()


@contextmanager
def saving() -> Iterator[None]:
    """Configs written in this context belong to a folder that gets its stored form and sidecar."""
    token = _SAVING.set(True)
    try:
        yield
    finally:
        _SAVING.reset(token)


def is_saving() -> bool:
    """Whether a surrounding `saving` sees to the rest of the folder."""
    return _SAVING.get()
