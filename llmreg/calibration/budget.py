"""Exact, sketched, or in several passes: what fits a given number of bytes.

Counted is what the sums hold until they are read: 4 bytes for each entry of the packed triangle or of the sketch and
of its test matrix, 8 for each column sum. Not counted are the model and its activations, the small pieces that a hook
copies, and what a method makes of the sums afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmreg.calibration.statistics import Need
from llmreg.calibration.sums import sketch_bytes, triangle_bytes
from llmreg.errors import RecipeError

__all__ = ["AUTO_SKETCH", "Plan", "plan_unlimited", "plan_within"]

#: Columns of a sketch whose size nobody gave: ample for adapters of rank 16 to 32.
AUTO_SKETCH = 128


@dataclass(frozen=True)
class Plan:
    """How a calibration will go.

    Attributes:
        size: columns of the sketches; None: exact.
        passes: the layers gathered in each pass over the data.
        reason: one sentence for the report.
        one_pass_bytes: of the smallest form of all sums together.
    """

    size: int | None
    passes: tuple[tuple[str, ...], ...]
    reason: str
    one_pass_bytes: int = 0

    def sketch_of(self, dim: int) -> int | None:
        """Columns of the sketch of an input of this width; None where the exact form takes no more memory."""
        return _sketch_of(dim, self.size)


def plan_unlimited(layers: Iterable[str], *, exact: bool | None, sketch: int | None) -> Plan:
    """One pass without a memory budget: exact, unless `exact=False` or a sketch size was given."""
    if exact is None:
        exact = sketch is None
    size = None if exact else _size(sketch)
    return Plan(size, (tuple(layers),), f"{_words(size)} in one pass: no memory budget was given")


def plan_within(
    budget: int,
    groups: Sequence[Sequence[str]],
    dims: Mapping[str, int],
    need: Need,
    *,
    exact: bool | None,
    sketch: int | None,
) -> Plan:
    """The first that fits: exact; sketched (`sketch` columns, or `AUTO_SKETCH`); several passes in the latter form.

    `exact=True` allows exact forms only, `exact=False` sketches only.

    Args:
        budget: bytes.
        groups: layers that share an input, in the order in which they are reached.
        dims: width of each layer's input.

    Raises:
        RecipeError: not even one input at a time fits; the message names the bytes that would.
    """
    sizes = ([None] if exact is not False else []) + ([_size(sketch)] if exact is not True else [])
    layers = tuple(name for group in groups for name in group)
    total = 0
    for size in sizes:
        total = _bytes([dims[group[0]] for group in groups], size, need)
        if total <= budget:
            return Plan(size, (layers,), f"{_words(size)} in one pass: {total} of {budget} bytes", total)
    size = sizes[-1]
    passes = _passes(groups, dims, size, need, budget)
    largest = max(_bytes([dims[group[0]] for group in part], size, need) for part in passes)
    names = tuple(tuple(name for group in part for name in group) for part in passes)
    reason = f"{_words(size)} in {len(passes)} passes of at most {largest} of {budget} bytes"
    return Plan(size, names, reason, total)


def _size(sketch: int | None) -> int:
    return AUTO_SKETCH if sketch is None else sketch


def _words(size: int | None) -> str:
    return "exact" if size is None else f"sketched with {size} columns"


def _sketch_of(dim: int, size: int | None) -> int | None:
    """With its test matrix a sketch must be smaller than the triangle."""
    return size if size is not None and 2 * sketch_bytes(dim, size) < triangle_bytes(dim) else None


def _bytes(widths: Sequence[int], size: int | None, need: Need) -> int:
    total = 0
    for dim in widths:
        sketch = _sketch_of(dim, size)
        total += triangle_bytes(dim) if sketch is None else sketch_bytes(dim, sketch)
        total += 8 * dim if need.mean else 0
    tests = [sketch_bytes(dim, sketch) for dim in set(widths) if (sketch := _sketch_of(dim, size)) is not None]
    return total + sum(tests)


def _passes(
    groups: Sequence[Sequence[str]], dims: Mapping[str, int], size: int | None, need: Need, budget: int
) -> list[list[Sequence[str]]]:
    """Neighbouring groups together, as many as fit."""
    minimum = max(_bytes([dims[group[0]]], size, need) for group in groups)
    if minimum > budget:
        raise RecipeError(
            f"a memory budget of {budget} bytes is too small for calibration ({_words(size)}): its largest layer input "
            f"alone needs {minimum} bytes; give at least that"
        )
    passes: list[list[Sequence[str]]] = [[]]
    for group in groups:
        if _bytes([dims[other[0]] for other in (*passes[-1], group)], size, need) > budget:
            passes.append([])
        passes[-1].append(group)
    return passes
