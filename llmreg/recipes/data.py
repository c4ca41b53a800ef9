"""Rows in TRL's formats: which columns hold what, checked row by row, and which rows are kept back.

Accepted as they are: `prompt` and `completion`, `messages` (or `conversations`), `text`, and GSM8K's `question` and
`answer`. `data.columns` maps anything else, by column name or by a template with column names in braces.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from .schema import Recipe
from .sources import FORMATS, columns_problem, is_local, is_pocket, kind_of, load_source

__all__ = ["TrainingData", "in_format", "load_training_data", "located", "scoring_rows"]

#: GSM8K as published, in the form lm-evaluation-harness asks it in.
_QUESTION_ANSWER = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}


@dataclass(frozen=True)
class TrainingData:
    """`datasets.Dataset`s in one of TRL's formats; `heldout` is None if the recipe asks for none."""

    train: Any
    heldout: Any


@contextmanager
def located(recipe: Recipe, *location: str | int) -> Iterator[None]:
    """Errors of this context get the place of `location` in the recipe."""
    try:
        yield
    except RecipeError as error:
        raise recipe.error(location, str(error)) from None


def load_training_data(recipe: Recipe) -> TrainingData:
    """Load `data.train` and the held-out rows (`data.test`, or `evaluation.heldout` rows kept back by the seed).

    Raises:
        RecipeError: a source that cannot be read, columns in no known format, a bad row by its number.
    """
    data = recipe.data
    with located(recipe, "data", "train"):
        train = in_format(load_source(data.train, data.split, data.config), data.columns)
    if data.test:
        with located(recipe, "data", "test"):
            heldout = in_format(load_source(data.test, data.test_split, data.config), data.columns)
        return TrainingData(train, _first(heldout, recipe.evaluation.limit))
    if not recipe.evaluation.heldout:
        return TrainingData(train, None)
    kept_back = recipe.evaluation.heldout
    if kept_back >= len(train):
        raise recipe.error(
            ("evaluation", "heldout"), f"{kept_back} rows cannot be kept back: {data.train} has only {len(train)}."
        )
    chosen = sorted(random.Random(f"heldout-{recipe.seed}").sample(range(len(train)), kept_back))
    others = sorted(set(range(len(train))) - set(chosen))
    return TrainingData(train.select(others), train.select(chosen))


def scoring_rows(recipe: Recipe, name: str) -> list[dict[str, str]]:
    """Rows of one source of `evaluation`, as plain `prompt`/`completion` or `text`.

    Raises:
        RecipeError: as `load_training_data`; conversations are not scored in this version.
    """
    same = name == recipe.data.train
    config = recipe.data.config if same else None
    rows = load_source(name, "train" if is_local(name) and not is_pocket(name) else "test", config)
    mapping = recipe.data.columns or {}
    fits = mapping and all(
        set(_columns_in(value, rows.column_names)) <= set(rows.column_names) for value in mapping.values()
    )
    rows = _first(in_format(rows, mapping if fits else None), recipe.evaluation.limit)
    if "messages" in rows.column_names or "conversations" in rows.column_names:
        raise RecipeError(f"{name} holds conversations, which this version does not score; give prompt and completion.")
    listed: list[dict[str, str]] = rows.to_list()
    if "prompt" in rows.column_names and not isinstance(listed[0]["prompt"], str):
        raise RecipeError(f"{name} holds conversations, which this version does not score; give prompts as text.")
    return listed


def _first(rows: Any, limit: int | None) -> Any:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def in_format(rows: Any, columns: Mapping[str, str] | None = None) -> Any:
    """Bring rows into one of TRL's formats and check each.

    Args:
        rows: a `datasets.Dataset`. columns: `data.columns` of the recipe.

    Returns:
        A data set with the columns of one format only (and `tools` beside conversations).

    Raises:
        RecipeError: no known format, a column that is not there, or a bad row by its number (from 1).
    """
    names = rows.column_names
    if (
        columns is None
        and not any(set(wanted) <= set(names) for wanted in FORMATS)
        and {"question", "answer"} <= set(names)
    ):
        columns = _QUESTION_ANSWER
    if columns is not None:
        rows = _mapped(rows, columns)
        names = rows.column_names
    wanted = next((wanted for wanted in FORMATS if set(wanted) <= set(names)), None)
    if wanted is None:
        raise RecipeError(_unknown_format(names))
    extra = [name for name in ("tools", "chat_template_kwargs") if name in names]
    rows = rows.select_columns([*wanted, *extra])
    for column in wanted:
        _check_column(rows, column)
    return rows


def _unknown_format(names: list[str]) -> str:
    if {"chosen", "rejected"} <= set(names):
        return (
            "the rows are preference pairs (chosen, rejected), which task sft cannot train on; task dpo is not in "
            "this version."
        )
    return (
        f"the columns {', '.join(names) or '(none)'} are in no known format; give prompt and completion, text, or "
        "messages, or map them with data.columns, for example {prompt: question, completion: answer}."
    )


def _mapped(rows: Any, columns: Mapping[str, str]) -> Any:
    problem = columns_problem(columns)
    if problem:
        raise RecipeError(problem)
    for value in columns.values():
        missing = [name for name in _columns_in(value, rows.column_names) if name not in rows.column_names]
        if missing:
            raise RecipeError(
                f"data.columns names {missing[0]!r}, but the data has the columns {', '.join(rows.column_names)}."
            )

    def fill(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {target: _filled(value, row, index) for target, value in columns.items()}

    return rows.map(fill, with_indices=True, remove_columns=rows.column_names, desc="Mapping columns")


def _columns_in(value: str, names: list[str]) -> list[str]:
    """The columns that a mapping's value needs: itself, or those a template has in braces."""
    if value in names or "{" not in value:
        return [value]
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError as error:
        raise RecipeError(f"data.columns has the template {value!r}, which is not one: {error}.") from None
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise RecipeError(f"data.columns has the template {value!r}; only plain column names may stand in braces.")
    return [name for _, name, _, _ in parts if name is not None]


def _filled(value: str, row: dict[str, Any], index: int) -> Any:
    if value in row:
        return row[value]
    text = []
    for literal, name, _, _ in string.Formatter().parse(value):
        text.append(literal)
        if name is not None:
            if row[name] is None:
                raise RecipeError(f"row {index + 1}: column {name!r} is empty.")
            text.append(str(row[name]))
    return "".join(text)


def _check_column(rows: Any, column: str) -> None:
    first = kind_of(rows[0][column])
    for number, value in enumerate(rows[column], start=1):
        if value is not None and kind_of(value) != first != "nothing":
            raise RecipeError(f"row {number}: column {column!r} holds {kind_of(value)}, but row 1 holds {first}.")
        if isinstance(value, str) and column not in ("messages", "conversations"):
            if not value and column == "text":
                raise RecipeError(f"row {number}: column 'text' is empty; remove the row.")
            continue
        problem = _message_problem(value) if isinstance(value, list) and column != "text" else None
        if value is None:
            problem = "is missing; every row needs it"
        elif not isinstance(value, list) or column == "text":
            wanted = "a list of messages" if column in ("messages", "conversations") else "text"
            problem = f"holds {kind_of(value)} ({str(value)[:40]!r}), but must hold {wanted}"
        if problem:
            raise RecipeError(f"row {number}: column {column!r} {problem}.")


def _message_problem(messages: list[Any]) -> str | None:
    if not messages:
        return "is an empty conversation; remove the row"
    for message in messages:
        keys = set(message) if isinstance(message, dict) else set()
        if not (keys >= {"role", "content"} or keys >= {"from", "value"}):
            return f"holds a message without role and content: {str(message)[:60]}"
    return None
