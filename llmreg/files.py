"""Files that appear whole or not at all: written beside their place and renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["commit_folder", "file_digest", "finite", "staged_folder", "write_json", "write_text"]


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` by atomic rename; an interruption leaves the old file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, by atomic rename; NaN and infinite numbers become null."""
    write_text(path, json.dumps(finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, streamed, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staged_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder on the same file system as `target`, removed afterwards whatever happens.

    It lies beside `target`, or inside where only that allows renaming (a mounted folder, a link to another disk).
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = not target.is_dir() or (
        target.stat().st_dev == target.parent.stat().st_dev and os.access(target.parent, os.W_OK)
    )
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent if beside else target))
    try:
        os.chmod(staging, 0o755)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit_folder(staging: Path, target: str | os.PathLike, marker: str) -> None:
    """Move every file of `staging` into `target`; `marker` (without which the folder is no adapter) goes last.

    A marker that is already there is removed first, so an interruption never leaves a mixture that loads.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    markers = list(staging.rglob(marker))
    for path in markers:
        (target / path.relative_to(staging)).unlink(missing_ok=True)
    others = [path for path in staging.rglob("*") if path.is_file() and path not in markers]
    for path in (*others, *markers):
        destination = target / path.relative_to(staging)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)
