"""Weights of which each process holds a part; those of DeepSpeed ZeRO-3 become whole for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from llmreg.weights.storage import is_dtensor

__all__ = ["gathered", "gathering_forwards", "is_sharded"]


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


@contextmanager
def gathering_forwards(model: nn.Module) -> Iterator[None]:
    """Within the context forwards of a model whose weights ZeRO-3 has partitioned work without its engine: every module
    has its own weights whole while it runs, one module at a time. A no-op without ZeRO-3.

    A collective: all ranks must run equally many forwards through the same modules.
    """
    held: dict[nn.Module, ExitStack] = {}

    def take(module: nn.Module, inputs: Any) -> None:
        held[module] = stack = ExitStack()
        stack.enter_context(_whole_parameters(module))

    def release(module: nn.Module, inputs: Any, output: Any) -> None:
        held.pop(module).close()

    handles = []
    for module in model.modules():
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(take, prepend=True), module.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in held.values():  # of a forward that failed
            stack.close()


@contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    import deepspeed

    own: list[Any] = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters([p for p in own if p.ds_status.name != "AVAILABLE"], modifier_rank=None):
        yield
