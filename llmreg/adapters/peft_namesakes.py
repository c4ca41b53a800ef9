"""PEFT's `EvaConfig` and `CordaConfig` are settings inside a `LoraConfig`; llmreg's of the same names are adapters.

Given to `get_peft_model`, PEFT's fail with an AttributeError about a field; here that error says what was meant.
"""

from __future__ import annotations

from typing import Any

from peft import EvaConfig
from peft.tuners.lora.config import CordaConfig

__all__ = ["explain_namesakes"]


def explain_namesakes() -> None:
    """Let the missing attributes of PEFT's two classes explain the mix-up (idempotent)."""
    for theirs, init in ((EvaConfig, "eva"), (CordaConfig, "corda")):
        theirs.__getattr__ = _explanation(theirs.__name__, init)


def _explanation(name: str, init: str) -> Any:
    def explain(self: Any, attribute: str) -> Any:
        if attribute.startswith("__"):  # copy and pickle ask for what need not be there
            raise AttributeError(attribute)
        raise AttributeError(
            f"peft.{name} has no {attribute!r}: it is not an adapter's config. It belongs in "
            f"peft.LoraConfig(init_lora_weights={init!r}, {init}_config=...); llmreg's method is llmreg.{name}(r=..., "
            "target_modules=...)."
        )

    return explain
