"""Checking a recipe's `adapter` and `training` against the dataclasses they configure: names, then types.

Values are compared with the class's own annotations, strictly (`true` is no number, `"16"` no integer), so that a
recipe written for a field PEFT or TRL added yesterday is checked like any other.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from .document import Location
from .load import nearest, suggestion
from .schema import Recipe

__all__ = ["check_fields", "hints"]

_ORDER = ("true or false", "an integer", "a number", "text", "a list", "a mapping")
_PLAIN = (bool, int, float, str, list, dict, tuple, type(None))


def check_fields(
    recipe: Recipe,
    section: str,
    values: Mapping[str, Any],
    config_class: Any,
    *,
    managed: Mapping[str, str],
    hidden: frozenset[str] = frozenset(),
    at: Location | None = None,
) -> None:
    """Check `values` of `recipe.<section>` against the fields of the dataclass `config_class`.

    Args:
        at: where the section stands, if not at the top.
        managed: fields that a recipe does not set -> what to write instead.
        hidden: fields that are never suggested.

    Raises:
        RecipeError: an unknown name (with a suggestion), a managed field, or a value of another type.
    """
    known = hints(config_class)
    offered = [name for name in known if name not in managed and name not in hidden]
    for name, value in values.items():
        location: Location = (*(at or (section,)), name)
        if name in managed:
            raise recipe.error(location, f"{section}.{name} is not set here: {managed[name]}.", at_key=True)
        if name not in known:
            message = f"unknown key '{section}.{name}' (not a field of {config_class.__name__}); "
            raise recipe.error(location, message + suggestion(name, offered), at_key=True)
        problem = _mismatch(known[name], value)
        if problem:
            raise recipe.error(location, f"{section}.{name} {problem}" + ("" if problem.endswith("?") else "."))


@functools.cache
def hints(config_class: Any) -> dict[str, Any]:
    """Annotations of the fields that the constructor takes."""
    try:
        annotations = typing.get_type_hints(config_class)
    except (NameError, TypeError):  # an annotation that only exists for type checkers: the value is not checked
        annotations = {}
    return {field.name: annotations.get(field.name, Any) for field in dataclasses.fields(config_class) if field.init}


def _mismatch(annotation: Any, value: Any) -> str | None:
    """What is wrong with `value`, in words, or None."""
    members = typing.get_args(annotation) or (annotation,)
    choices = [
        str(member.value)
        for kind in members
        if isinstance(kind, type) and issubclass(kind, enum.Enum)
        for member in kind
    ]
    if choices:
        if value is None and type(None) in members:
            return None
        return None if value in choices else f"should be {_either(choices)}, not {value!r}{_near(value, choices)}"
    plain = [kind for kind in members if _is_plain(kind) and kind is not type(None)]
    if not plain:
        names = " or ".join(_name(kind) for kind in members if kind is not type(None))
        allowed = value is None and type(None) in members
        return None if allowed else f"takes an object ({names}), which a recipe cannot write; leave it out"
    try:
        _adapter(annotation).validate_python(value)
    except PydanticUserError:
        return None
    except ValidationError as error:
        if error.errors()[0]["type"] == "finite_number":
            return "should be a finite number"
        literals = [
            str(choice)
            for kind in members
            if typing.get_origin(kind) is typing.Literal
            for choice in typing.get_args(kind)
        ]
        if typing.get_origin(annotation) is typing.Literal:
            literals = [str(choice) for choice in members]
            return f"should be {_either(literals)}, not {value!r}{_near(value, literals)}"
        names = " or ".join(sorted({_name(kind) for kind in plain}, key=_rank))
        return f"should be {names}, not {value!r:.80}{_near(value, literals)}"
    return None


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _is_plain(kind: Any) -> bool:
    return (
        kind is Any
        or typing.get_origin(kind) in (typing.Literal, list, dict, tuple)
        or kind in _PLAIN
        or not (isinstance(kind, type))
    )


def _name(kind: Any) -> str:
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
        tuple: "a list",
    }
    if typing.get_origin(kind) is typing.Literal:
        return _either([str(choice) for choice in typing.get_args(kind)])
    return words.get(typing.get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def _rank(name: str) -> tuple[int, str]:
    """A fixed order: that of a union depends on which equal union Python has seen first."""
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _either(choices: list[str]) -> str:
    return "one of " + ", ".join(choices) if len(choices) <= 12 else "one of its known values"


def _near(value: Any, choices: list[str]) -> str:
    near = nearest(value, choices) if isinstance(value, str) else None
    return f"; did you mean {near!r}?" if near else ""
