"""The `rewards` of a recipe: names and dotted paths become reward functions, checked before anything is loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import RecipeError
from ..evaluation import rewards as built_in
from .load import suggestion
from .schema import Recipe, Reward

__all__ = ["BUILT_IN", "check_answers", "check_rewards", "reward_functions"]

#: By the name that a recipe writes; `format` is made from its pattern.
BUILT_IN: dict[str, Callable[..., Any]] = {
    "pocket_arithmetic": built_in.pocket_arithmetic,
    "exact_match": built_in.exact_match,
    "math": built_in.math_answer,
    "format": built_in.format_of,
}
_COMPARES = ("exact_match", "math")


def check_rewards(recipe: Recipe) -> None:
    """Refuse rewards that are missing, unknown, of another task, or that this environment cannot compute.

    Raises:
        RecipeError: with where it was written and what to write.
    """
    if recipe.task != "grpo":
        if recipe.rewards is not None:
            raise recipe.error(
                ("rewards",), f"rewards are for task grpo, and this is {recipe.task}; remove the section.", at_key=True
            )
        return
    if not recipe.rewards:
        raise recipe.error(
            ("rewards",) if recipe.rewards is not None else ("task",),
            f"grpo learns from rewards and the recipe has none; write rewards: [{', '.join(BUILT_IN)}] or some of "
            "these, or package.module:function.",
        )
    if not any(reward.weight for reward in recipe.rewards):
        raise recipe.error(("rewards",), "no reward has a weight other than 0; give one some weight.", at_key=True)
    reward_functions(recipe)


def reward_functions(recipe: Recipe) -> list[Callable[..., Any]]:
    """The functions of the recipe's rewards, in order, each under the name that the recipe writes.

    Raises:
        RecipeError: as `check_rewards`.
    """
    names = list(_names(recipe.rewards or ()))
    return [_function(recipe, index, name) for index, name in enumerate(names)]


def _names(rewards: Sequence[Reward]) -> Iterator[str]:
    """Names for the log: one that repeats (formats of several patterns) is numbered."""
    seen: Counter[str] = Counter()
    for reward in rewards:
        seen[reward.name] += 1
        yield reward.name if seen[reward.name] == 1 else f"{reward.name}_{seen[reward.name]}"


def _function(recipe: Recipe, index: int, name: str) -> Callable[..., Any]:
    reward = (recipe.rewards or ())[index]
    location = ("rewards", index)
    if reward.pattern is not None and reward.name != "format":
        raise recipe.error((*location, "pattern"), f"a pattern is for the reward format, not for {reward.name}.")
    try:
        if reward.name == "format":
            function = built_in.format_of() if reward.pattern is None else built_in.format_of(reward.pattern)
        else:
            function = BUILT_IN.get(reward.name) or _imported(reward.name)
    except RecipeError as error:
        about = "pattern" if reward.pattern is not None else "name"
        raise recipe.error((*location, about), str(error)) from None
    if reward.name == "math" and importlib.util.find_spec("math_verify") is None:
        raise recipe.error(
            (*location, "name"), "the reward math needs the package math-verify; run pip install 'llmreg[math]'."
        )
    return _checked(function, name, recipe, index)


def _imported(name: str) -> Callable[..., Any]:
    """The function at "package.module:function"."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise RecipeError(
            f"there is no reward {name!r}; {suggestion(name, BUILT_IN)} A function of your own is written "
            "package.module:function."
        )
    if not module_name or not attribute or module_name.startswith("."):
        raise RecipeError(f"{name!r} is no path of a function; write package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        reason = str(error) if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"the reward {name} cannot be imported ({reason}); install its package, or put its folder on PYTHONPATH."
        ) from None
    function = getattr(module, attribute, None)
    if function is None:
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        hint = f"; {suggestion(attribute, known)}" if known else "."
        raise RecipeError(f"the module {module_name} has no {attribute!r}{hint}")
    if not callable(function) or not _takes_columns(function):
        raise RecipeError(
            f"{name} is no reward function; write one that takes (prompts, completions, **columns) and returns a "
            "number or None for each completion."
        )
    return function


def _takes_columns(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of C
        return False
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _checked(function: Callable[..., Any], name: str, recipe: Recipe, index: int) -> Callable[..., Any]:
    """`function` under `name`, with what it returns checked: one number or None for each completion."""

    @functools.wraps(function)
    def scored(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        values = list(function(prompts=prompts, completions=completions, **columns))
        problem = next((value for value in values if not _is_number(value)), None)
        if len(values) != len(completions) or problem is not None:
            returned = f"{problem!r:.60}" if problem is not None else f"{len(values)} values"
            raise recipe.error(
                ("rewards", index),
                f"the reward {name} returned {returned} for {len(completions)} completions; it must return a number or "
                "None for each.",
            )
        return [None if value is None else float(value) for value in values]

    scored.__name__ = name  # under which TRL logs it
    return scored


def _is_number(value: Any) -> bool:
    if value is None:
        return True
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)


def check_answers(recipe: Recipe, rows: Any) -> None:
    """Refuse rewards that compare with an answer where the rows have none.

    Raises:
        RecipeError: at the reward.
    """
    for index, reward in enumerate(recipe.rewards or ()):
        if reward.name in _COMPARES and "answer" not in rows.column_names:
            raise recipe.error(
                ("rewards", index, "name"),
                f"the reward {reward.name} compares with the column answer, which {recipe.data.train} does not have "
                f"(it has {', '.join(rows.column_names)}); write data.columns: {{prompt: ..., answer: ...}}.",
            )
