"""sha256 of files, remembered between runs.

Hashing a checkpoint of 16 GB takes minutes, so digests are kept in one JSON file in the folder of
`LLMREG_CACHE` (default `~/.cache/llmreg`). An entry holds for one path, size, modification and status-change
time. The file is replaced atomically; a damaged or unwritable one only costs time, and of two
processes writing at once one forgets its entry.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

from llmreg.errors import WeightError
from llmreg.files import file_digest, write_text

__all__ = ["cached_file_digest"]

_MOST_ENTRIES = 4096
_SETTLED = 2.0  # seconds: a file changed more recently could change again within one clock tick
_DIGEST = re.compile(r"[0-9a-f]{64}")


def cached_file_digest(path: str | Path) -> str:
    """sha256 (hex) of a file, streamed, from the cache where the file is unchanged.

    Raises:
        WeightError: the file cannot be read, or changes while it is.
    """
    try:
        real = Path(path).resolve(strict=True)
        key = _key(real)
        cached = _load().get(key)
        if cached is not None:
            return cached
        digest = file_digest(real)
        if _key(real) != key:
            raise WeightError(f"{path} changed while it was being hashed; wait until it is written")
        settled = time.time() - real.stat().st_mtime > _SETTLED
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error.strerror or error}") from error
    if settled:
        _remember(key, digest)
    return digest


def cache_file() -> Path:
    """Where digests are remembered."""
    folder = os.environ.get("LLMREG_CACHE") or Path.home() / ".cache" / "llmreg"
    return Path(folder) / "file_digests.json"


def _key(real: Path) -> str:
    stat = real.stat()
    return f"{real}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def _load() -> dict[str, str]:
    try:
        entries = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if isinstance(value, str) and _DIGEST.fullmatch(value)}


def _remember(key: str, digest: str) -> None:
    """Add one entry, newest last; what others wrote meanwhile is kept."""
    with contextlib.suppress(OSError, RuntimeError):
        entries = list(_load().items())[-(_MOST_ENTRIES - 1) :]
        write_text(cache_file(), json.dumps({**dict(entries), key: digest}, indent=0))
