"""Addition and subtraction of two-digit numbers, always written with two digits (``07``, not ``7``).

A small model learns column arithmetic only if the columns stand still, hence the fixed width; sums stay
below 100 and differences above -1. One pair of operands in ten is kept for validation and one for testing:
neither is ever shown in pretraining, in any phrasing, nor in the word problems a model is fine-tuned on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .seeded import bucket

__all__ = ["PHRASINGS", "SPLITS", "Sum", "sums"]

SPLITS = ("train", "validation", "test")

PHRASINGS: dict[str, tuple[str, str]] = {
    "+": ("Compute {a} + {b} =", "What is {a} plus {b}? Answer:"),
    "-": ("Compute {a} - {b} =", "What is {a} minus {b}? Answer:"),
}


@dataclass(frozen=True)
class Sum:
    """One calculation, ``a + b`` or ``a - b``; `result` lies in 0 .. 99."""

    a: int
    operation: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.operation == "+" else self.a - self.b

    def fill(self, phrasing: str, **names: str) -> str:
        """Return `phrasing` with the two-digit operands (and any other `names`) in place."""
        return phrasing.format(a=f"{self.a:02d}", b=f"{self.b:02d}", **names)

    @property
    def answer(self) -> str:
        """The completion: a space and two digits."""
        return f" {self.result:02d}"


@lru_cache(maxsize=16)
def sums(seed: int, split: str) -> tuple[Sum, ...]:
    """Return every calculation of `split` (``train``, ``validation`` or ``test``) in the world `seed`."""
    return tuple(s for s in _all_sums() if SPLITS[_split_index(seed, s)] == split)


def _split_index(seed: int, s: Sum) -> int:
    return {8: 1, 9: 2}.get(bucket("sum", seed, s.a, s.operation, s.b, n=10), 0)


def _all_sums() -> Iterator[Sum]:
    for a in range(100):
        for b in range(100):
            if a + b < 100:
                yield Sum(a, "+", b)
            if a >= b:
                yield Sum(a, "-", b)
