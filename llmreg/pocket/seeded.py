"""Randomness that gives the same draws on every machine and every Python version.

The standard library promises that `random.Random(seed).random()` never changes, and promises nothing of the
kind for `choice`, `shuffle` or `sample`. `Dice` therefore builds everything from `random()` alone. Seeds
are strings; `random.Random` hashes them with SHA-512, so `PYTHONHASHSEED` plays no part.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Dice", "bucket"]

T = TypeVar("T")


class Dice:
    """A seeded source of choices, independent of the global random state.

    Args:
        *keys: whatever names this stream, for example ``("world", 0, "names")``; equal keys give equal draws.
    """

    def __init__(self, *keys: str | int) -> None:
        self._random = random.Random("/".join(["llmreg-pocket", *map(str, keys)]))

    def below(self, n: int) -> int:
        """Return a uniform integer in ``0 .. n - 1``."""
        return int(self._random.random() * n)

    def pick(self, items: Sequence[T]) -> T:
        """Return one of `items`, uniformly."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return a new list with `items` in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


def bucket(*keys: str | int, n: int) -> int:
    """Assign `keys` to one of `n` buckets by SHA-256: a split independent of any order of drawing."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % n
