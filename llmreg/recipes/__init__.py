"""Recipes: the schema of the YAML files, loading and checking them, and running them.

    from llmreg.recipes import load_recipe, run
    report = run(load_recipe("recipes/quickstart.yaml", ["training.max_steps=100"]))

`load_recipe` checks what is llmreg's own, `plan` also the fields of the method's config and of TRL's, and `run` trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .load import dump_recipe, load_recipe, make_recipe
from .schema import Recipe

if TYPE_CHECKING:
    from .planning import Plan, plan
    from .running import run

__all__ = ["Plan", "Recipe", "dump_recipe", "load_recipe", "make_recipe", "plan", "run"]


def __getattr__(name: str) -> Any:
    """`plan` and `run` import torch and TRL, so they are imported when they are asked for."""
    if name in ("Plan", "plan"):
        from . import planning

        return getattr(planning, name)
    if name == "run":
        from .running import run

        return run
    raise AttributeError(f"module 'llmreg.recipes' has no attribute {name!r}")
