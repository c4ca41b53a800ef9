"""Running something once PEFT has been imported, by whoever imports it; `import llmreg` costs nothing before that."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["after_peft"]


def after_peft(action: Callable[[], None]) -> None:
    """Call `action` now if PEFT is imported already, else right after it has been."""
    if "peft" in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(action))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds PEFT as everybody else does, and lets its loader call `action` at the end; then steps aside."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "peft":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:  # not here: `find_spec` is also how others ask for PEFT
                execute(module)  # raises where PEFT cannot be imported; it may be tried again
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.action()

            loader: Any = spec.loader
            loader.exec_module = exec_module
        return spec
