"""What llmreg raises and warns with.

Every message says what was given, what was expected, and what to write instead.
The classes also derive from the built-in a PEFT user would catch (`ValueError`, `TypeError`, ...),
so code written against plain PEFT keeps working.
"""

from __future__ import annotations

__all__ = [
    "AdapterFileError",
    "BaseMismatchError",
    "LlmregError",
    "LlmregWarning",
    "RecipeError",
    "TrainingStopped",
    "UnsupportedError",
    "WeightError",
]


class LlmregError(Exception):
    """Base of every error that llmreg raises on purpose."""


class RecipeError(LlmregError, ValueError):
    """The user's recipe, arguments or data are wrong; the command line exits with 2."""


class UnsupportedError(LlmregError, ValueError):
    """Asked for something the method cannot do; the message names it and the alternative."""


class WeightError(LlmregError, ValueError):
    """A base weight cannot be read or decomposed (unknown storage, NaN/Inf, rank too large)."""


class AdapterFileError(LlmregError, ValueError):
    """A saved adapter is damaged, altered, or of a form that must not be loaded."""


class BaseMismatchError(AdapterFileError):
    """A saved adapter belongs to another base model."""


class LlmregWarning(UserWarning):
    """Something the user should know, though the result is right."""


class TrainingStopped(SystemExit):
    """SIGTERM ended a training after a checkpoint; the exit code is 143."""

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message
