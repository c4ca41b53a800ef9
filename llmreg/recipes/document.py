"""A recipe's text as plain values, with the line and column of every key and value.

The YAML is the plain part of YAML 1.2: mappings, lists and scalars. `1e-3` is a number, `yes` and `no` are words, and
tags, anchors, aliases, duplicate keys and deep nesting are refused, so nothing is built that is not written out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

__all__ = ["MAX_BYTES", "Document", "Location", "PlainDumper", "parse", "parse_value", "read_text"]

MAX_BYTES = 1_000_000
_MAX_DEPTH = 16
Location = tuple[str | int, ...]


@dataclass
class Document:
    """The values of a recipe and where each was written.

    Attributes:
        name: the file, as the user gave it.
        values: the mapping.
        keys, places: for each location ("training", "max_steps"), where its key and its value stand.
    """

    name: str
    values: dict[str, Any]
    keys: dict[Location, str] = field(default_factory=dict)
    places: dict[Location, str] = field(default_factory=dict)

    def error(self, location: Location, message: str, *, at_key: bool = False) -> RecipeError:
        """A `RecipeError` that opens with where `location` (or what encloses it) was written."""
        places = self.keys if at_key else self.places
        for length in range(len(location), -1, -1):
            place = places.get(location[:length]) or self.places.get(location[:length])
            if place:
                return RecipeError(f"{place}: {message}")
        return RecipeError(f"{self.name}: {message}")


class _Loader(yaml.SafeLoader):
    """Composes nodes only; anchors and aliases are refused, and depth is limited."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Refused("anchors and aliases (& and *) are not supported; write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"YAML tags are not supported; remove {event.tag!r}", event.start_mark)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _Refused(f"values are nested deeper than {_MAX_DEPTH} levels", event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_Loader.yaml_implicit_resolvers = {}
_NULL, _BOOL, _INT, _FLOAT, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class PlainDumper(yaml.SafeDumper):
    """Writes text in quotes wherever `parse` would read something else without them, such as 1e5."""

    def represent_text(self, text: str) -> Any:
        plain = self.represent_str(text)
        if not text.isprintable():  # line breaks of Unicode would be read as spaces
            plain.style = '"'
        elif plain.style is None and _Loader("").resolve(yaml.ScalarNode, text, (True, False)) != _TEXT:
            plain.style = "'"
        return plain


PlainDumper.add_representer(str, PlainDumper.represent_text)


class _Refused(Exception):
    def __init__(self, message: str, mark: Any) -> None:
        super().__init__(message)
        self.mark = mark


def read_text(path: str | Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it is missing, a folder, unreadable, larger than `MAX_BYTES` or not UTF-8.
    """
    file = Path(path).expanduser()
    try:
        if file.is_dir():
            raise RecipeError(f"{path} is a folder; give the recipe's .yaml file.")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist; give the path of a recipe, a .yaml file.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES // 1000:,} kB, so it is not a recipe.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}), so it is not a recipe.") from None


def parse(text: str, name: str) -> Document:
    """Parse a recipe.

    Args:
        text: YAML. name: of the file, for messages.

    Raises:
        RecipeError: not YAML, not a mapping, or something of YAML that recipes do not use; with line and column.
    """
    document = Document(name, {})
    node = _compose(text, name)
    document.places[()] = name
    value = _build(node, (), document) if node is not None else None
    if not isinstance(value, dict):
        what = "is empty" if value is None else f"holds a {_kind(value)}"
        raise RecipeError(f"{name}: a recipe is a mapping with keys such as model, data and adapter, but this {what}.")
    document.values = value
    return document


def parse_value(text: str, name: str) -> Any:
    """The value of a `key=value` override, parsed as YAML.

    Raises:
        RecipeError: as `parse`.
    """
    try:
        node = _compose(text, name)
        return None if node is None else _build(node, (), Document(name, {}))
    except RecipeError as error:  # the line and column within one argument help nobody
        raise RecipeError(re.sub(f"^{re.escape(name)}:[0-9]+:[0-9]+", lambda _: name, str(error))) from None


def _compose(text: str, name: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except _Refused as error:
        raise RecipeError(f"{_place(name, error.mark)}: {error}.") from None
    except yaml.MarkedYAMLError as error:
        place = _place(name, error.problem_mark) if error.problem_mark else name
        raise RecipeError(f"{place}: not valid YAML: {error.problem or error.context or 'cannot be parsed'}.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise RecipeError(f"{name}: not valid YAML: {reason}.") from None


def _place(name: str, mark: Any) -> str:
    return f"{name}:{mark.line + 1}:{mark.column + 1}"


def _build(node: Any, location: Location, document: Document) -> Any:
    if location:
        document.places[location] = _place(document.name, node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*location, i), document) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, document.name)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(document.name, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{place}: a key must be a word, not a mapping or a list.")
        key = key_node.value
        if key in values:
            raise RecipeError(f"{place}: {key!r} is given twice; keep one of them.")
        document.keys[(*location, key)] = place
        values[key] = _build(value_node, (*location, key), document)
    return values


def _scalar(node: Any, name: str) -> Any:
    text = node.value
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    try:
        if node.tag == _INT:
            return int(text)
        if node.tag == _FLOAT:
            number = float(text.replace(".inf", "inf").replace(".nan", "nan")) if text[-1].isalpha() else float(text)
            if not math.isfinite(number):
                raise ValueError
            return number
    except ValueError:
        raise RecipeError(f"{_place(name, node.start_mark)}: {text[:40]!r} is not a finite number.") from None
    return text


def _kind(value: Any) -> str:
    return {list: "list", str: "single text", bool: "single value"}.get(type(value), "single number")
