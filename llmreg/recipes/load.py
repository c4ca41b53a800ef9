"""From a file and `key=value` overrides to a checked `Recipe`; every complaint says where and what to write instead."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import RecipeError
from .document import Document, Location, parse, parse_value, read_text
from .schema import SECTIONS_TO_COME, Recipe

__all__ = ["dump_recipe", "load_recipe", "make_recipe", "nearest", "suggestion"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply overrides, and check every key and value that is llmreg's own.

    Args:
        path: a YAML file.
        overrides: `"training.max_steps=20"`, applied in order; the value is parsed as YAML.

    Raises:
        RecipeError: with file, line and column, what was found and what to write.
    """
    document = parse(read_text(path), str(path))
    for override in overrides:
        _apply(document, override)
    return _validate(document)


def make_recipe(values: Mapping[str, Any], overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """The same from a mapping, for use in Python.

    Raises:
        RecipeError: as `load_recipe`, with `name` in place of the file.
    """
    try:
        text = yaml.safe_dump(dict(values), sort_keys=False)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: a recipe holds plain values only: {error}.") from None
    document = Document(name, parse(text, name).values, places={(): name})
    for override in overrides:
        _apply(document, override)
    return _validate(document)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads again."""
    return yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)


def suggestion(given: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'?"`, or the known words where none is near and they are few."""
    known = sorted(known)
    near = nearest(given, known)
    if near:
        return f"did you mean {near!r}?"
    return f"known here: {', '.join(known)}." if len(known) <= 12 else "see the documentation for what is known here."


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The word of `known` that was probably meant, or None; one that begins as `given` does is preferred."""
    known, given = list(known), given.lower()
    begun = [
        word for word in known if len(word) > 2 < len(given) and (word.startswith(given) or given.startswith(word))
    ]
    near = difflib.get_close_matches(given, begun or known, n=1, cutoff=0.0 if begun else 0.6)
    return near[0] if near else None


def _apply(document: Document, override: str) -> None:
    key, equals, text = override.partition("=")
    name = f"argument {override!r}" if len(override) <= 80 else f"argument {override[:77]!r}..."
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{name}: an override is written key=value, for example training.max_steps=20.")
    value = parse_value(text, name)
    values, location = document.values, tuple(parts)
    for depth, part in enumerate(parts[:-1], start=1):
        inner = values.get(part)
        if inner is None:
            inner = values[part] = {}
            document.keys[location[:depth]] = document.places[location[:depth]] = name
        if not isinstance(inner, dict):
            raise RecipeError(f"{name}: {'.'.join(parts[:depth])} is a single value, so it has no {parts[depth]!r}.")
        values = inner
    values[parts[-1]] = value
    for places in (document.keys, document.places):
        for known in [place for place in places if place[: len(location)] == location]:
            del places[known]
        places[location] = name


def _validate(document: Document) -> Recipe:
    for section in SECTIONS_TO_COME:
        if document.values.get(section) is not None:
            raise document.error((section,), f"{section} is not in this version of llmreg; remove it.", at_key=True)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        raise _explain(document, error) from None
    recipe._document = document
    return recipe


def _explain(document: Document, error: ValidationError) -> RecipeError:
    """The first complaint in words; unknown keys come first, since they often explain the others."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    location: Location = tuple(problem["loc"])
    dotted = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        known = _section(location[:-1]).model_fields
        return document.error(location, f"unknown key {dotted!r}; {suggestion(str(location[-1]), known)}", at_key=True)
    if problem["type"] == "missing":
        return document.error(location[:-1], f"{dotted!r} is missing; it must be given.", at_key=True)
    if problem["type"] in ("to_come", "unknown_task"):
        return document.error(location, f"{problem['msg']}.")
    if problem["type"] in ("model_type", "model_attributes_type"):
        expected = "should be a mapping of keys to values"
    else:
        expected = problem["msg"].replace("Input should", "should").replace("valid tuple", "list")
    given = problem["input"]
    message = f"{dotted} {expected}, not {reprlib.repr(given)}"
    choices = str(problem.get("ctx", {}).get("expected", ""))
    if isinstance(given, str) and "'" in choices:
        near = nearest(given, choices.split("'")[1::2])
        message += f"; did you mean {near!r}?" if near else "."
    return document.error(location, message if message.endswith(("?", ".")) else f"{message}.")


def _section(location: Location) -> type[BaseModel]:
    """The model class that describes the mapping at `location`."""
    section: type[BaseModel] = Recipe
    for key in location:
        inner = section.model_fields[str(key)].annotation
        assert isinstance(inner, type)
        section = inner
    return section
