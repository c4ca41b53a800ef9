"""Calls of PEFT's tuners that llmreg's tuners answer differently, whatever their method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

__all__ = ["TunerCalls"]


class TunerCalls:
    """Mixin in front of a tuner."""

    #: Called with the tuner before adapters are merged into the base; rooms above this one add theirs.
    before_merge: ClassVar[list[Callable[[Any], None]]] = []

    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, after `before_merge`."""
        for call in TunerCalls.before_merge:
            call(self)
        super().merge_adapter(*args, **kwargs)  # type: ignore[misc]

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """As in PEFT; but if the active adapter goes, its successor is the same on all layers.

        PEFT lets each layer choose among the adapters it has left, so layers that the successor does not target
        would silently activate a third one.
        """
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        if was_active and self.active_adapters:
            self.set_adapter(self.active_adapters)

    def unload(self: Any) -> nn.Module:
        """The base model bit for bit. PEFT would leave the trained copies of `modules_to_save` in it."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        return super().unload()  # type: ignore[misc]
