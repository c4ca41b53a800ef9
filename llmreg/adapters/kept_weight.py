"""A layer's weight put aside before merging, so that unmerging is bit-exact; or replaced by another."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["copy_weight", "put_back", "replace_weight"]


def copy_weight(base: nn.Module) -> tuple[Any, Any]:
    """The weight as it is stored, and bitsandbytes' int8 state where there is one."""
    return copy.deepcopy(base.weight), copy.deepcopy(getattr(base, "state", None))


def put_back(base: Any, kept: tuple[Any, Any]) -> None:
    """Undo everything since `copy_weight`, bit for bit."""
    weight, state = kept
    if state is None and not hasattr(weight, "quant_state"):
        base.weight.data = weight.data  # the parameter object stays: ties and optimizers may refer to it
        return
    base.weight = weight
    if hasattr(weight, "quant_state"):
        base.quant_state = weight.quant_state
    if state is not None:
        base.state = copy.copy(state)


def replace_weight(base: Any, weight: nn.Parameter) -> None:
    """Let a quantised layer hold another parameter. What it held stays as it was, for whoever still refers to it."""
    base.weight = weight
    if hasattr(weight, "quant_state"):
        base.quant_state = weight.quant_state
    if getattr(base, "state", None) is not None:
        base.state = copy.copy(base.state)
        base.state.CB = base.state.SCB = None  # the next forward takes them from the weight
