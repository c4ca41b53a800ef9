"""Recipes: the schema of the YAML files, loading and checking them, and running them.

    from llmreg.recipes import load_recipe, run
    report = run(load_recipe("recipes/quickstart.yaml", ["training.max_steps=100"]))

`load_recipe` checks what is llmreg's own, `plan` also the fields of the method's config and of TRL's, and `run` trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .load import dump_recipe, load_recipe, make_recipe
from .schema import Recipe

if TYPE_CHECKING:
    from .dry_run import Preview, preview
    from .evaluating import Evaluation, evaluate
    from .json_schema import recipe_schema
    from .planning import Plan, plan
    from .running import run
    from .starting import StartReport, StatisticsReport, prepare_starts

__all__ = [
    "Evaluation",
    "Plan",
    "Preview",
    "Recipe",
    "StartReport",
    "StatisticsReport",
    "dump_recipe",
    "evaluate",
    "load_recipe",
    "make_recipe",
    "plan",
    "prepare_starts",
    "preview",
    "recipe_schema",
    "run",
]
#: What imports torch and TRL is imported when it is asked for.
_LATER = {
    "Evaluation": "evaluating",
    "evaluate": "evaluating",
    "recipe_schema": "json_schema",
    "Plan": "planning",
    "plan": "planning",
    "Preview": "dry_run",
    "preview": "dry_run",
    "run": "running",
    "StartReport": "starting",
    "StatisticsReport": "starting",
    "prepare_starts": "starting",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module 'llmreg.recipes' has no attribute {name!r}")
