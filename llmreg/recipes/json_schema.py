"""The JSON schema of a recipe, from which editors complete and check while typing.

What a method's config and TRL's config take is read from the classes that are installed, so the schema knows every
field that `llmreg validate` knows.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from ..methods import catalogue
from .fields import hints
from .planning import adapter_fields_left_out, training_fields_left_out
from .regularizing import known_regularizers
from .rewards import BUILT_IN
from .schema import Recipe
from .tasks import TASKS, config_class

__all__ = ["recipe_schema"]


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 7) of a recipe; `training` depends on `task`, and `adapter` on its `method`."""
    schema = Recipe.model_json_schema()
    properties = schema["properties"]
    properties["include"] = {"type": "string", "description": "A recipe that this one is laid over."}
    properties["task"] = {"enum": list(TASKS), "default": "sft", "description": "What is trained."}
    properties["training"] = {"type": "object", "description": "Any field of the task's TRL or transformers config."}
    reward = {"$ref": "#/$defs/Reward"}
    properties["rewards"] = {
        "type": "array",
        "items": {"anyOf": [{"enum": list(BUILT_IN)}, {"type": "string", "pattern": "^[^:]+:[^:]+$"}, reward]},
        "description": "Of grpo: names, or names with a weight.",
    }
    properties["regularizers"] = _regularizers()
    methods = list(catalogue().values())
    properties["adapter"] = {
        "type": "object",
        "required": ["method"],
        "properties": {"method": {"enum": [row.name for row in methods], "description": "See `llmreg methods`."}},
        "allOf": [
            {
                "if": {"properties": {"method": {"const": row.name}}, "required": ["method"]},
                "then": {
                    "properties": {
                        "method": {"const": row.name, "description": row.what},
                        **_fields(row.config_class(), adapter_fields_left_out(row)),
                    },
                    "additionalProperties": False,
                },
            }
            for row in methods
        ],
    }
    schema["allOf"] = [
        {
            "if": _is_task(kind.name),
            "then": {
                "properties": {
                    "training": {
                        "properties": _fields(config_class(kind), training_fields_left_out(kind)),
                        "additionalProperties": False,
                    }
                }
            },
        }
        for kind in TASKS.values()
    ]
    _leave_to_the_included(schema)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": f"Fields of {', '.join(f'{name} {version(name)}' for name in ('peft', 'transformers', 'trl'))}.",
        **schema,
        "title": "llmreg recipe",
        "description": "What `llmreg train` does; `llmreg schema` prints this schema.",
    }


def _regularizers() -> dict[str, Any]:
    """A list of names, or of mappings with the fields of each name's class."""
    known = known_regularizers()
    entries = [
        {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"const": name, "description": (kind.__doc__ or "").strip().splitlines()[0]},
                "teacher": {"type": "string", "description": "Of a classifier: a checkpoint with a trained head."},
                **_fields(kind, frozenset()),
            },
            "additionalProperties": False,
        }
        for name, kind in known.items()
    ]
    one = {"anyOf": [{"enum": list(known)}, *entries]}
    return {
        "description": "Terms that are added to the loss.",
        "anyOf": [one, {"type": "array", "items": one}, {"type": "null"}],
    }


def _is_task(name: str) -> dict[str, Any]:
    """A recipe for this task; without `task` it is sft, unless an included recipe says otherwise."""
    written = {"properties": {"task": {"const": name}}, "required": ["task"]}
    if name != "sft":
        return written
    return {"anyOf": [written, {"not": {"anyOf": [{"required": ["task"]}, {"required": ["include"]}]}}]}


def _leave_to_the_included(schema: dict[str, Any]) -> None:
    """What must be there must be there only in a recipe that includes no other."""
    inner = {"adapter": schema["properties"]["adapter"].pop("required")}
    for section in ("model", "data", "output"):
        definition = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
        inner[section] = definition.pop("required")
    whole = {
        "required": schema.pop("required"),
        "properties": {key: {"required": names} for key, names in inner.items()},
    }
    schema["anyOf"] = [{"required": ["include"]}, whole]


def _fields(config: Any, left_out: frozenset[str]) -> dict[str, Any]:
    """The properties that the dataclass `config` takes."""
    texts = {field.name: field.metadata.get("help") for field in dataclasses.fields(config)}
    out = {}
    for name, annotation in hints(config).items():
        if name not in left_out:
            try:
                value = TypeAdapter(annotation).json_schema()
            except (PydanticUserError, NameError, TypeError):  # a type that only exists in Python
                value = {}
            if "$defs" in value:  # enumerations and nested classes of the libraries: checked by `llmreg validate`
                value = {}
            if "anyOf" in value:  # the order of a union depends on which equal union Python has seen first
                value["anyOf"] = sorted(value["anyOf"], key=str)
            text = " ".join(str(texts[name]).split()) if texts.get(name) else None
            out[name] = {**value, **({"description": text} if text else {})}
    return out
