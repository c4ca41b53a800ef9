"""Starts that were decomposed before: one safetensors file a layer, found by what decides its bits.

`use_starts(folder)` says which folder `start_factors` reads and fills; outside of it nothing is kept on disk. A file's
name is that of its `StartKey`, and a hit gives the bits that a miss would compute. Entries appear by rename, with no
lock: of two processes that compute the same start the last one wins. A damaged entry is removed and computed again; a
folder that cannot be written to costs only the caching.

NaN and Inf are refused on a hit too: the same bytes were decomposed before, which only finite weights survive.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..errors import LlmregWarning, RecipeError
from ..initializers import Factors
from ..sizes import parse_size
from ..weights.digests import cache_file
from ..weights.hashing import update
from .start_key import StartKey, fast_digest

__all__ = [
    "StartCache",
    "StartEntry",
    "clear",
    "contents",
    "current_starts",
    "default_folder",
    "default_limit",
    "limit",
    "use_starts",
]

logger = logging.getLogger("llmreg")

_NAME = re.compile(r"start-[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.start-[0-9a-f]{64}\.safetensors\..+")
_ABANDONED = 3600.0  # seconds after which an unfinished file cannot belong to a living process
_MOST_HEADER = 1 << 16  # bytes


# -- which cache ------------------------------------------------------------------------------------------------


@dataclass
class StartCache:
    """One folder of starts in use.

    Attributes:
        folder: where the entries lie; created with the first.
        max_bytes: what they may take together.
        hits, layers: layers taken from the cache, and layers started, since `use_starts`.
    """

    folder: Path
    max_bytes: int
    hits: int = 0
    layers: int = 0
    _writable: bool = True
    _filled: bool = False

    def load(self, keys: Sequence[StartKey]) -> list[Factors] | None:
        """The factors of layers that are decomposed together; None unless all of them are here."""
        found = []
        for key in keys:
            factors = self._load(key)
            if factors is None:
                return None
            found.append(factors)
        self.hits += len(found)
        return found

    def _load(self, key: StartKey) -> Factors | None:
        path = self.folder / key.file_name
        try:
            factors = _parse(_read(path, key), key)
        except OSError:  # not there, or not ours to read
            return None
        except Exception as error:  # safetensors and JSON raise many kinds over bytes that make no sense
            logger.info("The damaged start %s is computed again: %s", path, error)
            _remove(path)
            return None
        try:
            os.utime(path)  # last use, for `limit`
        except OSError:
            pass
        return factors

    def store(self, keys: Sequence[StartKey], factors: Iterable[Factors]) -> None:
        """Keep new factors; the first entry that cannot be written ends the writing, with one warning."""
        try:
            for key, one in zip(keys, factors, strict=True):
                if self._writable:
                    _write(self.folder / key.file_name, _content(one, key))
                    self._filled = True
        except OSError as error:
            self._give_up(error)

    def finish(self, hits: int, layers: int) -> None:
        """Report that one adapter's `layers` are started, `hits` of them from here; make room if any were added."""
        self.layers += layers
        logger.info("%d of %d layers from the cache", hits, layers)
        if self._filled:
            self._filled = False
            try:
                limit(self.folder, self.max_bytes)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._writable:
            self._writable = False
            warnings.warn(
                f"The cache of starts {self.folder} cannot be written to ({error.strerror or error}); the run goes on "
                "without keeping its starts. Free space, or set LLMREG_CACHE to a folder that you may write to.",
                LlmregWarning,
                stacklevel=2,
            )


_CACHE: ContextVar[StartCache | None] = ContextVar("llmreg_start_cache", default=None)


@contextmanager
def use_starts(folder: str | os.PathLike | None) -> Iterator[StartCache | None]:
    """Adapters injected in this context take their starts from `folder`, and leave new ones there; None: no cache.

    Raises:
        RecipeError: `LLMREG_CACHE_LIMIT` is not a size.
    """
    cache = None if folder is None else StartCache(Path(folder), default_limit())
    token = _CACHE.set(cache)
    try:
        yield cache
    finally:
        _CACHE.reset(token)


def current_starts() -> StartCache | None:
    """The cache of the surrounding `use_starts`, if any."""
    return _CACHE.get()


def default_folder() -> Path:
    """`starts` in the folder of `LLMREG_CACHE`, by default `~/.cache/llmreg`."""
    return cache_file().parent / "starts"


def default_limit() -> int:
    """Bytes that a cache may take: `LLMREG_CACHE_LIMIT`, by default 20 GB.

    Raises:
        RecipeError: the variable is not a size.
    """
    text = os.environ.get("LLMREG_CACHE_LIMIT", "").strip() or "20GB"
    size = parse_size(text)
    if size is None:
        raise RecipeError(
            f"LLMREG_CACHE_LIMIT is {text!r}, which is not a size; write bytes or a unit, such as 5368709120 or 5GB."
        )
    return size


# -- one entry --------------------------------------------------------------------------------------------------


def _content(factors: Factors, key: StartKey) -> bytes:
    parts = {"A": factors.A, "B": factors.B, "singular_values": factors.singular_values}
    parts = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
    metadata = {"llmreg_start": key.text(), "digest": _factors_digest(parts, key)}
    return safetensors.torch.save(parts, metadata)


def _factors_digest(parts: dict[str, Tensor], key: StartKey) -> str:
    digest = fast_digest(key.text())
    for name in sorted(parts):
        update(digest, name, parts[name])
    return digest.hexdigest()


def _shapes(key: StartKey, parts: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    out_features, in_features = key.shape
    rank = parts["singular_values"].numel() if key.rank is None else key.rank
    return {"A": (rank, in_features), "B": (out_features, rank), "singular_values": (rank,)}


def _read(path: Path, key: StartKey) -> bytes:
    """The whole file: a mapped one would kill the process if it were cut short meanwhile."""
    status = path.lstat()
    most = _MOST_HEADER + 4 * (key.rank or max(key.shape)) * (sum(key.shape) + 1)
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise ValueError(f"expected a file of at most {most} bytes")
    return path.read_bytes()


def _parse(content: bytes, key: StartKey) -> Factors:
    """The factors in an entry's bytes; raises whatever fits if they are not those of `key`."""
    parts = safetensors.torch.load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if metadata["llmreg_start"] != key.text():
        raise ValueError("it is another layer's start")
    if {name: tuple(part.shape) for name, part in parts.items()} != _shapes(key, parts):
        raise ValueError("its factors have other shapes")
    if any(part.dtype != getattr(torch, key.dtype) for part in parts.values()):
        raise ValueError("its factors have another dtype")
    if metadata["digest"] != _factors_digest(parts, key):
        raise ValueError("its bytes were altered")
    return Factors(**parts)


def _write(path: Path, content: bytes) -> None:
    """By rename, and without waiting for the disk: what a power cut leaves incomplete, the digest finds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove(path: Path) -> bool:
    """Whether the file (or link) was there and is gone now; what cannot be removed stays."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


# -- the folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartEntry:
    """One cached start, for a table: `shape` is the layer's (out, in), `bytes` those of the file."""

    method: str
    rank: int
    shape: tuple[int, int]
    bytes: int
    last_use: datetime


def limit(folder: str | os.PathLike, max_bytes: int) -> tuple[int, int]:
    """Remove the least recently used entries until the rest takes at most `max_bytes`; (count, bytes) removed."""
    files = sorted(_files(folder), key=lambda file: (file[1].st_mtime_ns, file[0].name))
    excess = sum(status.st_size for _, status in files) - max_bytes
    count = removed = 0
    for path, status in files:
        if removed >= excess:
            break
        if _remove(path):
            count, removed = count + 1, removed + status.st_size
    return count, removed


def clear(folder: str | os.PathLike) -> tuple[int, int]:
    """Remove all entries and nothing else; (count, bytes) removed. Links are neither followed nor removed."""
    gone = [status.st_size for path, status in _files(folder) if _remove(path)]
    return len(gone), sum(gone)


def contents(folder: str | os.PathLike) -> list[StartEntry]:
    """The entries, last used first; those that cannot be read are left out."""
    entries = []
    for path, status in _files(folder):
        try:
            with open(path, "rb") as file:
                header = file.read(min(_MOST_HEADER, int.from_bytes(file.read(8), "little")))
            head = json.loads(header)
            key, rank = json.loads(head["__metadata__"]["llmreg_start"]), int(head["A"]["shape"][0])
            shape = (int(key["shape"][0]), int(key["shape"][1]))
            used = datetime.fromtimestamp(status.st_mtime, UTC)
            entries.append(StartEntry(str(key["method"]), rank, shape, status.st_size, used))
        except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
            continue
    return sorted(entries, key=lambda entry: entry.last_use, reverse=True)


def _files(folder: str | os.PathLike) -> list[tuple[Path, os.stat_result]]:
    """Regular files that have an entry's name, and unfinished ones that no process will finish."""
    found = []
    try:
        with os.scandir(Path(folder)) as items:
            for item in items:
                if not (_NAME.fullmatch(item.name) or _TEMPORARY.fullmatch(item.name)):
                    continue
                try:
                    status = item.stat(follow_symlinks=False)
                except OSError:  # another process removed it
                    continue
                old = status.st_mtime < time.time() - _ABANDONED
                if stat.S_ISREG(status.st_mode) and (old or not item.name.startswith(".")):
                    found.append((Path(item.path), status))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return found
