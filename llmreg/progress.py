"""Progress bars for whatever takes over a second: on a terminal only, and only once that second has passed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["meter", "track"]

T = TypeVar("T")
_DELAY_SECONDS = 1.0


def track(items: Sequence[T], description: str, *, unit: str = "") -> Iterator[T]:
    """Iterate over `items`; after a second of it, show a bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=len(items))
    started = time.monotonic()
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not bar.live.is_started and time.monotonic() - started > _DELAY_SECONDS:
                bar.start()
    finally:
        bar.stop()


@contextmanager
def meter(description: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar for work that is pulled from elsewhere; the yielded function advances it by one and sets its note.

    Shown under the same conditions as `track`'s; without a `total` it counts without an end.
    """
    if not sys.stderr.isatty():
        yield lambda note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total, note="")
    started = time.monotonic()

    def advance(note: str) -> None:
        bar.update(task, advance=1, note=note)
        if not bar.live.is_started and time.monotonic() - started > _DELAY_SECONDS:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
