"""Rows in the formats of the tasks: which columns hold what, checked row by row, and which rows are kept back.

Accepted as they are: what `tasks.py` lists for the task (TRL's formats; `text` and `label` for classification), and
GSM8K's `question` and `answer`. `data.columns` maps anything else, by column name or by a template with column names
in braces. Rows for grpo keep their other columns, for the reward functions.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..evaluation.rewards import final_answer, text_of
from .rewards import check_answers
from .schema import Recipe
from .sources import columns_problem, is_local, is_pocket, kind_of, load_source
from .tasks import SCORED_FORMATS, TASKS, Formats

__all__ = [
    "Classes",
    "TrainingData",
    "classes_of",
    "in_format",
    "load_training_data",
    "located",
    "numbered",
    "scoring_rows",
]

#: GSM8K as published, in the form lm-evaluation-harness asks it in.
_QUESTION_ANSWER = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
_MESSAGES = ("messages", "conversations")
#: Columns that hold text alone; the others hold text or a conversation.
_TEXT = ("text", "text_pair")
#: Columns that TRL's GRPO reads as something else, or does not pass on to reward functions.
_NOT_PASSED_ON = ("completion", "completion_ids", "image", "images", "environment")


@dataclass(frozen=True)
class Classes:
    """The classes of a classification.

    Attributes:
        names: in the order of their numbers.
        by_name: the training data gives labels as text, so that a number elsewhere is a name too, not a position.
    """

    names: tuple[str, ...]
    by_name: bool


@dataclass(frozen=True)
class TrainingData:
    """`datasets.Dataset`s in one of the task's formats; `heldout` is None if the recipe asks for none.

    For classification labels are numbers, and `classes` says what they are called; else it is None.
    """

    train: Any
    heldout: Any
    classes: Classes | None = None


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
    data, formats = recipe.data, TASKS[recipe.task].formats
    with located(recipe, "data", "train"):
        rows = load_source(data.train, data.split, data.config)
        train = _prompts(rows, data.columns) if recipe.task == "grpo" else in_format(rows, data.columns, formats)
        classes = classes_of(train, data.train) if recipe.task == "classification" else None
        if classes:
            train = _with_numbers(train, classes)
    check_answers(recipe, train)
    if data.test:
        with located(recipe, "data", "test"):
            heldout = in_format(load_source(data.test, data.test_split, data.config), data.columns, formats)
            heldout = _first(heldout, recipe.evaluation.limit)
            if classes:
                heldout = _with_numbers(heldout, classes)
        return TrainingData(train, heldout, classes)
    if not recipe.evaluation.heldout:
        return TrainingData(train, None, classes)
    kept_back = recipe.evaluation.heldout
    if kept_back >= len(train):
        raise recipe.error(
            ("evaluation", "heldout"), f"{kept_back} rows cannot be kept back: {data.train} has only {len(train)}."
        )
    chosen = sorted(random.Random(f"heldout-{recipe.seed}").sample(range(len(train)), kept_back))
    others = sorted(set(range(len(train))) - set(chosen))
    return TrainingData(train.select(others), train.select(chosen), classes)


def scoring_rows(recipe: Recipe, name: str, classes: Classes | None = None) -> list[dict[str, Any]]:
    """Rows of one source of `evaluation`, in one of the formats that are scored for the recipe's task.

    The `test` split, or the whole of a single file. Labels are numbers of `classes`.

    Raises:
        RecipeError: as `load_training_data`; conversations are not scored in this version.
    """
    same = name == recipe.data.train
    config = recipe.data.config if same else None
    is_file = is_local(name) and not is_pocket(name) and not Path(name).expanduser().is_dir()
    rows = load_source(name, "train" if is_file else "test", config)
    mapping, formats = recipe.data.columns or {}, SCORED_FORMATS[TASKS[recipe.task].peft_task_type]
    if recipe.task == "grpo":
        formats = (("prompt", "answer"), *formats)
    fits = any(set(mapping) == set(wanted) for wanted in formats) and all(
        set(_columns_in(value, rows.column_names)) <= set(rows.column_names) for value in mapping.values()
    )
    if not fits and set(_MESSAGES) & set(rows.column_names):
        raise RecipeError(f"{name} holds conversations, which this version does not score; give prompt and completion.")
    rows = _first(in_format(rows, mapping if fits else None, formats), recipe.evaluation.limit)
    if recipe.task == "grpo" and "prompt" in rows.column_names and "chosen" not in rows.column_names:
        rows = _with_answers(rows).rename_column("answer", "completion").map(_with_space)
    if classes is not None:
        rows = _with_numbers(rows, classes)
    listed: list[dict[str, Any]] = rows.to_list()
    if "prompt" in rows.column_names and not isinstance(listed[0]["prompt"], str):
        raise RecipeError(f"{name} holds conversations, which this version does not score; give prompts as text.")
    return listed


def classes_of(rows: Any, name: str) -> Classes:
    """The classes: those the data set names, its text labels in order, or the numbers as text.

    Raises:
        RecipeError: fewer than two classes, or numbers that do not start at 0 or leave one out.
    """
    feature = rows.features["label"]
    if hasattr(feature, "names"):
        return Classes(tuple(feature.names), by_name=False)
    labels = sorted(set(rows["label"]))
    if len(labels) < 2:
        raise RecipeError(f"all rows have the label {labels[0]!r}; classification needs at least two classes.")
    if isinstance(labels[0], str):
        return Classes(tuple(labels), by_name=True)
    if labels != list(range(len(labels))):
        raise RecipeError(
            f"the labels are {', '.join(map(str, labels[:8]))}; number them from 0 without a gap, or give them as text."
        )
    if is_pocket(name):
        from ..pocket import TASKS as POCKET_TASKS

        return Classes(POCKET_TASKS[name].classes, by_name=False)
    return Classes(tuple(map(str, labels)), by_name=False)


def numbered(labels: Sequence[int | str], classes: Classes) -> list[int]:
    """Labels as numbers of `classes`.

    Raises:
        RecipeError: a label that the training data does not have, by its row.
    """
    numbers = {name: number for number, name in enumerate(classes.names)}
    out = []
    for row, label in enumerate(labels, start=1):
        number = numbers.get(str(label), -1) if isinstance(label, str) or classes.by_name else label
        if not 0 <= number < len(classes.names):
            known = ", ".join(classes.names)
            raise RecipeError(f"row {row} has the label {label!r}; the training data has {known}.")
        out.append(number)
    return out


def _with_numbers(rows: Any, classes: Classes) -> Any:
    return rows.remove_columns("label").add_column("label", numbered(rows["label"], classes))


def _prompts(rows: Any, columns: Mapping[str, str] | None) -> Any:
    """Rows for grpo: a prompt, an answer where there is one, and every other column."""
    from datasets import concatenate_datasets

    formatted = in_format(rows, columns, TASKS["grpo"].formats)
    answered = _with_answers(formatted) if {"answer", "completion"} & set(formatted.column_names) else formatted
    others = [name for name in rows.column_names if name not in (*answered.column_names, *_NOT_PASSED_ON)]
    return concatenate_datasets([answered, rows.select_columns(others)], axis=1) if others else answered


def _with_answers(rows: Any) -> Any:
    """`answer` as the text of a right completion, from `answer` or `completion`; GSM8K's without its reasoning."""
    if "completion" in rows.column_names:
        rows = rows.rename_column("completion", "answer")
    return rows.map(lambda row: {"answer": final_answer(text_of(row["answer"]))}, desc="Reading answers")


def _with_space(row: dict[str, Any]) -> dict[str, str]:
    """A space in front, as a model writes it: the longest completion is the limit of what is generated."""
    text = row["completion"]
    return {"completion": text if text[:1].isspace() else f" {text}"}


def _first(rows: Any, limit: int | None) -> Any:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def in_format(rows: Any, columns: Mapping[str, str] | None = None, formats: Formats = TASKS["sft"].formats) -> Any:
    """Bring rows into one of `formats` and check each.

    Args:
        rows: a `datasets.Dataset`. columns: `data.columns` of the recipe. formats: the task's.

    Returns:
        A data set with the columns of one format only (and `tools` beside conversations).

    Raises:
        RecipeError: no known format, a column that is not there, or a bad row by its number (from 1).
    """
    names = rows.column_names
    if (
        columns is None
        and not any(set(wanted) <= set(names) for wanted in formats)
        and {"question", "answer"} <= set(names)
        and tuple(_QUESTION_ANSWER) in formats
    ):
        columns = _QUESTION_ANSWER
    if columns is not None:
        rows = _mapped(rows, columns, formats)
        names = rows.column_names
    wanted = next((wanted for wanted in formats if set(wanted) <= set(names)), None)
    if wanted is None:
        raise RecipeError(_unknown_format(names, formats))
    extra = [name for name in ("tools", "chat_template_kwargs") if name in names]
    rows = rows.select_columns([*wanted, *extra])
    for column in wanted:
        if column == "label":
            _check_labels(rows)
        else:
            _check_column(rows, column)
    return rows


def _unknown_format(names: list[str], formats: Formats) -> str:
    fitting = [
        (len(wanted), kind.name)
        for kind in TASKS.values()
        for wanted in kind.formats
        if kind.formats != formats and set(wanted) <= set(names)
    ]
    meant = f"; these are rows for task {max(fitting)[1]}" if fitting else ""
    known = "; ".join(" and ".join(wanted) for wanted in formats)
    first = formats[0]
    example = ", ".join(f"{column}: {other}" for column, other in zip(first, names or ["..."], strict=False))
    return (
        f"the columns {', '.join(names) or '(none)'} are in no known format{meant}; give {known}, or map them with "
        f"data.columns, for example {{{example}}}."
    )


def _mapped(rows: Any, columns: Mapping[str, str], formats: Formats) -> Any:
    problem = columns_problem(columns, formats)
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


def _check_labels(rows: Any) -> None:
    first = kind_of(rows[0]["label"])
    for number, value in enumerate(rows["label"], start=1):
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise RecipeError(f"row {number}: the label is {value!r}; it must be a whole number or a class name.")
        if kind_of(value) != first:
            raise RecipeError(f"row {number}: column 'label' holds {kind_of(value)}, but row 1 holds {first}.")


def _check_column(rows: Any, column: str) -> None:
    first = kind_of(rows[0][column])
    for number, value in enumerate(rows[column], start=1):
        if value is not None and kind_of(value) != first != "nothing":
            raise RecipeError(f"row {number}: column {column!r} holds {kind_of(value)}, but row 1 holds {first}.")
        if isinstance(value, str) and column not in _MESSAGES:
            if not value and column == "text":
                raise RecipeError(f"row {number}: column 'text' is empty; remove the row.")
            continue
        problem = _message_problem(value) if isinstance(value, list) and column not in _TEXT else None
        if value is None:
            problem = "is missing; every row needs it"
        elif not isinstance(value, list) or column in _TEXT:
            wanted = "a list of messages" if column in _MESSAGES else "text"
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
