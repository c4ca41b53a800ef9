"""From a file and `key=value` overrides to a checked `Recipe`; every complaint says where and what to write instead.

`include: other.yaml` (relative to the file it stands in) lays this recipe over another: mappings are merged key by key,
everything else replaces. `${NAME}` and `${NAME:-default}` in paths and names of models and data are taken from the
environment.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import RecipeError
from .document import Document, Location, PlainDumper, parse, parse_value, read_text
from .schema import Recipe

__all__ = ["dump_recipe", "load_recipe", "make_recipe", "nearest", "suggestion"]

_MOST_INCLUDES = 8
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
#: Where the environment may stand.
_PATHS = (
    ("model", "name"),
    ("data", "train"),
    ("data", "test"),
    ("calibration", "data"),
    ("evaluation", "tasks"),
    ("evaluation", "forgetting"),
    ("output", "dir"),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply overrides, and check every key and value that is llmreg's own.

    Args:
        path: a YAML file.
        overrides: `"training.max_steps=20"`, applied in order; the value is parsed as YAML.

    Raises:
        RecipeError: with file, line and column, what was found and what to write.
    """
    document = _included(parse(read_text(path), str(path)), Path(path).expanduser().parent)
    for override in overrides:
        _apply(document, override)
    return _validate(document)


def make_recipe(values: Mapping[str, Any], overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """The same from a mapping, for use in Python.

    Raises:
        RecipeError: as `load_recipe`, with `name` in place of the file.

    Example:
        >>> values = {"model": {"name": "pocket"}, "data": {"train": "pocket/word-problems"}}
        >>> values |= {"adapter": {"method": "pissa", "r": 16}, "output": {"dir": "runs/mine"}}
        >>> make_recipe(values, ["training.max_steps=20"]).training
        {'max_steps': 20}
    """
    try:
        text = yaml.safe_dump(dict(values), sort_keys=False)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: a recipe holds plain values only: {error}.") from None
    document = _included(Document(name, parse(text, name).values, places={(): name}), Path())
    for override in overrides:
        _apply(document, override)
    return _validate(document)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads again."""
    return yaml.dump(recipe.resolved(), Dumper=PlainDumper, sort_keys=False, allow_unicode=True)


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


def _included(document: Document, folder: Path, above: tuple[Path, ...] = ()) -> Document:
    """`document` laid over the recipe that its `include` names, if it has one."""
    if "include" not in document.values:
        return document
    name = document.values.pop("include")
    if not isinstance(name, str) or not name:
        raise document.error(("include",), f"include should be the path of one recipe, not {reprlib.repr(name)}.")
    try:
        file = (folder / Path(_from_environment(name)).expanduser()).resolve()
        if file in above or len(above) >= _MOST_INCLUDES:
            raise RecipeError(f"{name} includes itself" if file in above else "recipes include each other too deeply")
        base = _included(parse(read_text(file), _shown(file)), file.parent, (*above, file))
    except (RecipeError, OSError, RuntimeError, ValueError) as error:
        raise document.error(("include",), str(error)) from None
    return _overlaid(base, document)


def _shown(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _overlaid(base: Document, top: Document) -> Document:
    def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
        merged = dict(below)
        for key, value in above.items():
            both = isinstance(value, dict) and isinstance(below.get(key), dict)
            merged[key] = merge(below[key], value) if both else value
        return merged

    keys, places = {**base.keys, **top.keys}, {**base.places, **top.places}
    return Document(top.name, merge(base.values, top.values), keys, places)


def _from_environment(text: str) -> str:
    """`text` with `${NAME}` and `${NAME:-default}` filled in.

    Raises:
        RecipeError: a variable that is not set and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise RecipeError(f"the environment variable {name} is not set; set it, or write ${{{name}:-a default}}.")
        return found

    return _VARIABLE.sub(value, text)


def _fill_environment(values: Any, location: Location, document: Document) -> Any:
    """`values` at `location`, with the environment filled into every text."""
    if isinstance(values, dict):
        return {key: _fill_environment(value, (*location, key), document) for key, value in values.items()}
    if isinstance(values, list):
        return [_fill_environment(value, (*location, i), document) for i, value in enumerate(values)]
    if not isinstance(values, str):
        return values
    try:
        return _from_environment(values)
    except RecipeError as error:
        raise document.error(location, str(error)) from None


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
    for section, key in _PATHS:
        inner = document.values.get(section)
        if isinstance(inner, dict) and key in inner:
            inner[key] = _fill_environment(inner[key], (section, key), document)
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
        message = problem["msg"]
        return document.error(location, message if message.endswith("?") else f"{message}.")
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
        if isinstance(key, str):  # an item of a list is described by the list's annotation
            section = next(_models(section.model_fields[key].annotation))
    return section


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)
