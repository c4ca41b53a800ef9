"""Weights of which each process holds a part; those of DeepSpeed ZeRO-3 become whole for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmreg.weights.storage import is_dtensor

__all__ = ["gathered", "is_sharded"]


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of the weight (ZeRO-3, FSDP2); reading it asks the other ranks."""
    weight = module.weight
    return hasattr(weight, "ds_id") or is_dtensor(weight)


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the weights of `modules` are whole on every rank; a no-op without ZeRO-3.

    A collective under ZeRO-3: every rank must enter with the same modules, in the same order. One layer at a time
    keeps the memory at one layer.
    """
    weights: list[Any] = [module.weight for module in modules if hasattr(getattr(module, "weight", None), "ds_id")]
    # Those that a running forward or backward holds are whole already, and not ours to take away afterwards.
    weights = [weight for weight in weights if weight.ds_status.name != "AVAILABLE"]
    if not weights:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=None):
        yield
