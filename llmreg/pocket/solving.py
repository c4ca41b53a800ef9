"""The answer key of the arithmetic tasks: from a prompt alone to its result, in every phrasing that they use.

A prompt must be a phrasing from its first character to its last; so a result is given for what these tasks ask and for
nothing else.
"""

from __future__ import annotations

import re
from functools import cache

from . import arithmetic, reworded, word_problems
from .arithmetic import Sum

__all__ = ["solve"]

_FIELD = re.compile(r"\\{(\w+)\\}")


def solve(prompt: str) -> str | None:
    """The two digits that answer `prompt`; None if it is not a question of the pocket tasks, spaces at the ends apart.

    >>> solve("Compute 34 + 21 =")
    '55'
    """
    for operation, question in _questions():
        match = question.fullmatch(prompt.strip())
        if match:
            result = Sum(int(match["a"]), operation, int(match["b"])).result
            return f"{result:02d}" if 0 <= result < 100 else None
    return None


@cache
def _questions() -> tuple[tuple[str, re.Pattern[str]], ...]:
    tables = (arithmetic.PHRASINGS, reworded.PHRASINGS, word_problems.STORIES)
    return tuple(
        (operation, _pattern(phrasing))
        for table in tables
        for operation, phrasings in table.items()
        for phrasing in phrasings
    )


def _pattern(phrasing: str) -> re.Pattern[str]:
    """The phrasing with two digits for each operand and any words for the other names, the same where one repeats."""
    seen: set[str] = set()

    def field(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d\d)" if name in "ab" else rf"(?P<{name}>[^\d.,?]+)"

    return re.compile(_FIELD.sub(field, re.escape(phrasing)))
