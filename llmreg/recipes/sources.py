"""Data sources by name: a pocket task, a local file or folder, or a Hub data set; all become `datasets.Dataset`."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError

__all__ = ["SUFFIXES", "check_name", "columns_problem", "is_local", "is_pocket", "kind_of", "load_source"]

#: File endings that are read, and the reader of `datasets` for each.
SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_pocket(name: str) -> bool:
    """Whether `name` is meant as a task of the pocket world."""
    return name.startswith("pocket/")


def is_local(name: str) -> bool:
    """Whether `name` is a file or folder, or can only be meant as one."""
    return name.startswith((".", "/", "~")) or Path(name).suffix in SUFFIXES or _exists(name)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def check_name(name: str) -> str | None:
    """What is wrong with the name of a source, as a sentence, or None; the network is not asked."""
    if is_pocket(name):
        from ..pocket import TASKS

        if name in TASKS:
            return None
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}."
        return f"there is no pocket task {name!r}; {hint}"
    if is_local(name):
        if not _exists(name):
            return f"the file {name!r} does not exist; check the path, which starts at the current folder."
        path = Path(name).expanduser()
        if path.is_file() and path.suffix not in SUFFIXES:
            return f"the file {name!r} cannot be read as data; its name must end in {', '.join(SUFFIXES)}."
        return None
    if _HUB_ID.fullmatch(name):
        return None
    return (
        f"{name[:80]!r} names no data; write a pocket task (pocket/word-problems), a Hub id (owner/name), or a file "
        f"ending in {', '.join(SUFFIXES)}."
    )


def columns_problem(columns: Mapping[str, str], formats: Sequence[Sequence[str]]) -> str | None:
    """What is wrong with a recipe's `data.columns` for a task that reads `formats`, as a sentence, or None."""
    if any(set(columns) == set(wanted) for wanted in formats):
        return None
    known = "; ".join(" and ".join(wanted) for wanted in formats)
    return f"data.columns gives {', '.join(columns) or 'nothing'}; it must give one of: {known}."


def load_source(name: str, split: str = "train", config: str | None = None) -> Any:
    """Load a source.

    Args:
        name: as in a recipe. split: of a pocket task or Hub data set; a file is read whole.
        config: the Hub data set's configuration.

    Returns:
        A `datasets.Dataset`, with the columns as they are; memory-mapped unless it is a pocket task.

    Raises:
        RecipeError: it cannot be read (a bad row by its number) or has no rows.
    """
    from datasets import Dataset

    problem = check_name(name)
    if problem:
        raise RecipeError(problem)
    if is_pocket(name):
        from ..pocket import load_split

        rows = Dataset.from_list(load_split(name, split))
    elif is_local(name):
        rows = _local(Path(name).expanduser(), split)
    else:
        rows = _hub(name, split, config)
    if not len(rows):
        raise RecipeError(f"{name} has no rows; give data with at least one.")
    return rows


def _local(path: Path, split: str) -> Any:
    from datasets import load_dataset

    if path.is_file() and not path.stat().st_size:
        raise RecipeError(f"{path} has no rows; give data with at least one.")
    try:
        if path.is_dir():
            return load_dataset(str(path), split=split)
        options = _csv_as_text(path) if path.suffix == ".csv" else {}
        return load_dataset(SUFFIXES[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # the readers raise whatever their formats raise
        raise RecipeError(_bad_row(path) or f"{path} cannot be read as data: {_cause(error)}.") from None


def _csv_as_text(path: Path) -> dict[str, Any]:
    """Reader options that keep every value as it stands: else " 42" becomes a number and "NA" nothing."""
    from datasets import Features, Value

    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    return {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}


def _hub(name: str, split: str, config: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # network, missing repository, missing configuration or split
        raise RecipeError(
            f"the data set {name} (split {split}) cannot be loaded: {_cause(error)}; check the name, data.config and "
            "the connection, or give a local file."
        ) from None


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".")


def _bad_row(path: Path) -> str | None:
    """The first row of a JSON-lines file that is damaged or differs from the rows before it."""
    if path.suffix != ".jsonl":
        return None
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f"{path}, row {number} is not valid JSON: {error}."
        if not isinstance(row, dict):
            return f"{path}, row {number} is not a mapping of columns to values but {line.strip()[:40]!r}."
        for column, value in row.items():
            if value is None:
                continue
            kind = kind_of(value)
            first, where = kinds.setdefault(column, (kind, number))
            if kind != first:
                return f"{path}, row {number}: column {column!r} holds {kind}, but row {where} holds {first}."
    return None if kinds else f"{path} has no rows; give data with at least one."


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    words = {str: "text", list: "a list", dict: "a mapping", bool: "true or false", type(None): "nothing"}
    return words.get(type(value), "a number")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.strip())
