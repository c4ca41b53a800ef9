"""Independent decompositions on the threads of a CPU: one matrix a thread, instead of one matrix on all of them.

The products of a narrow block with a weight gain little from more threads, and the small factorisations between them
nothing; side by side both do. On one thread each, the bits do not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["Map", "at_once", "side_by_side"]

T = TypeVar("T")
R = TypeVar("R")
Map = Callable[[Callable[[T], R], Sequence[T]], list[R]]


def at_once(items: int) -> int:
    """How many of `items` run side by side: one a thread, or one after the other where there are fewer than threads."""
    threads = torch.get_num_threads()
    return threads if items >= threads else 1


@contextmanager
def side_by_side() -> Iterator[Map]:
    """A `map(function, items)` that runs on as many Python threads as torch has, results in order.

    Fewer items than threads run one after the other, on all threads each. Gradients are off inside. The first
    exception, in the order of the items, is raised once all have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield lambda function, items: [function(item) for item in items]
        return
    # The initialiser sets the count of its own thread, but also what threads that start meanwhile begin with.
    with ThreadPoolExecutor(threads, "llmreg-start", torch.set_num_threads, (1,)) as pool:

        def run(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
            if at_once(len(items)) == 1:
                return [function(item) for item in items]
            return list(pool.map(torch.no_grad()(function), items))

        try:
            yield run
        finally:
            pool.shutdown()
            torch.set_num_threads(threads)
