"""The geometry of a report's plots, without any markup: values in, places on a canvas of 1000 x 1000 out.

The template stretches the canvas to the width of the page and sets the tick labels as text beside it, so that a plot is
as legible on a phone as on paper. Curves of thousands of points are thinned to the lowest and the highest point of
each bin, which draws the same picture: no spike disappears.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

__all__ = ["Axis", "Plot", "Tick", "averaged", "curve", "drawable", "spectrum", "thinned"]

Points = list[tuple[float, float]]

_CANVAS = 1000
_LARGEST = 1e30  # beyond this a value says only that the run diverged, and differences would overflow
_NOISY = 50  # a curve that turns more often than this gets its mean drawn over it


@dataclass(frozen=True)
class Tick:
    """A label at `place`, in percent of its axis."""

    place: float
    label: str


@dataclass(frozen=True)
class Axis:
    """The interval [low, high], linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies, in percent from `low` to `high`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 100 * (value - low) / (high - low)

    def ticks(self, count: int = 5, *, whole: bool = False) -> tuple[Tick, ...]:
        """At most `count` intervals between round numbers inside the axis; `whole` allows only integers."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.log and self.high / self.low > 3:
            subs = (1, 2, 5) if self.high / self.low < 1e3 else (1,)
            values = LogLocator(subs=subs, numticks=2 * count).tick_values(self.low, self.high)
        else:
            values = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(self.low, self.high)
        places = [(self.place(float(value)), float(value)) for value in values if value > 0 or not self.log]
        inside = [(min(max(place, 0), 100), value) for place, value in places if -0.2 <= place <= 100.2]
        return tuple(Tick(round(place, 2), _tick_label(value)) for place, value in inside)


@dataclass(frozen=True)
class Plot:
    """One plot, ready to be drawn.

    Attributes:
        name: heading. description: what a reader who cannot see it is told. note: how to read it, or "".
        x_label: under the axis. x_ticks, y_ticks: in percent from the left and from the bottom.
        line: the curve, as `points` of an SVG polyline. faint: every value behind a line that is their mean, or "".
        band: the closed polygon between the smallest and the largest values, or "".
    """

    name: str
    description: str
    note: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    line: str
    faint: str = ""
    band: str = ""


def drawable(points: Iterable[Sequence[Any]]) -> Points:
    """The (x, y) pairs in order of x, without those that are NaN, infinite or beyond 1e30."""
    pairs = ((float(x), float(y)) for x, y in points)
    return sorted((x, y) for x, y in pairs if abs(x) < _LARGEST and abs(y) < _LARGEST)


def thinned(points: Points, bins: int) -> Points:
    """At most `2 * bins + 2` of `points`: the lowest and the highest of each bin of x, the first and the last."""
    if len(points) <= 2 * bins:
        return points
    kept = {points[0], points[-1]}
    for members in _binned(points, bins):
        kept |= {min(members, key=lambda point: point[1]), max(members, key=lambda point: point[1])}
    return sorted(kept)


def averaged(points: Points, bins: int) -> Points:
    """The mean point of each bin of x."""
    return [(fmean(x for x, _ in members), fmean(y for _, y in members)) for members in _binned(points, bins)]


def curve(name: str, points: Iterable[Sequence[Any]], *, bins: int = 300) -> Plot | None:
    """`points`, (step, value) each, as a line; None if none of them can be drawn."""
    given = list(points)
    drawn = drawable(given)
    if not drawn:
        return None
    left_out = len(given) - len(drawn)
    x, y = (_around(values, from_zero=True) for values in zip(*drawn, strict=True))
    noisy = _turns(drawn) > _NOISY
    notes = [
        "Pale: every value. Strong: their mean." if noisy else "",
        f"{left_out:,} of {len(given):,} values are not finite numbers and are left out." if left_out else "",
    ]
    values = _polyline(thinned(drawn, bins), x, y)
    return Plot(
        name=name,
        description=_described(name, drawn),
        note=" ".join(filter(None, notes)),
        x_label="step",
        x_ticks=x.ticks(whole=True),
        y_ticks=y.ticks(4),
        line=_polyline(averaged(drawn, 60), x, y) if noisy else values,
        faint=values if noisy else "",
    )


def spectrum(name: str, layers: Mapping[str, Sequence[float]], *, bins: int = 100) -> Plot | None:
    """Singular values by index on a log scale: the median over the layers in a band from the smallest to the largest.

    None if no value can be drawn; zeros have no place on a log scale and are left out.
    """
    columns: dict[int, list[float]] = {}
    for values in layers.values():
        for index, value in drawable(enumerate(values, start=1)):
            if value > 0:
                columns.setdefault(int(index), []).append(value)
    if not columns:
        return None
    indices = sorted(columns)
    x = _around([float(index) for index in indices])
    y = _around([value for column in columns.values() for value in column], log=True)
    smallest, middle, largest = (
        thinned([(float(index), pick(columns[index])) for index in indices], bins) for pick in (min, median, max)
    )
    several = len(layers) > 1
    return Plot(
        name=name,
        description=_described(f"{name}, median of {len(layers):,} layers" if several else name, middle, "index"),
        note=f"Log scale. Line: median of {len(layers):,} layers. Band: smallest to largest."
        if several
        else "Log scale.",
        x_label="index",
        x_ticks=x.ticks(whole=True),
        y_ticks=y.ticks(4),
        line=_polyline(middle, x, y),
        band=_polyline(largest + smallest[::-1], x, y) if several else "",
    )


def _binned(points: Points, bins: int) -> list[Points]:
    """`points` by equal intervals of x, empty ones left out."""
    first, last = points[0][0], points[-1][0]
    width = (last - first) / bins or 1.0
    members: dict[int, Points] = {}
    for point in points:
        members.setdefault(min(int((point[0] - first) / width), bins - 1), []).append(point)
    return [members[index] for index in sorted(members)]


def _turns(points: Points) -> int:
    """How often the curve changes between rising and falling."""
    steps = [after - before for (_, before), (_, after) in pairwise(points) if after != before]
    return sum((first > 0) != (second > 0) for first, second in pairwise(steps))


def _around(values: Sequence[float], *, log: bool = False, from_zero: bool = False) -> Axis:
    """An axis that holds `values`; `from_zero` starts it at 0 where that costs less than half of the height."""
    low, high = min(values), max(values)
    if from_zero and 0 <= low < high / 2:
        low = 0.0
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0))
    return Axis(low, high, log)


def _polyline(points: Points, x: Axis, y: Axis) -> str:
    """The `points` attribute; whole units of the canvas are finer than any screen shows it."""
    scale = _CANVAS / 100
    places = [f"{scale * x.place(a):.0f},{_CANVAS - scale * y.place(b):.0f}" for a, b in points]
    return " ".join(places if len(places) > 1 else places * 2)  # a single point is drawn as a dot


def _described(name: str, points: Points, x_label: str = "step") -> str:
    (first, start), (last, end) = points[0], points[-1]
    lowest, highest = (pick(points, key=lambda point: point[1]) for pick in (min, max))
    return (
        f"{name}: {start:.3g} at {x_label} {first:,.0f}, {end:.3g} at {x_label} {last:,.0f}; "
        f"lowest {lowest[1]:.3g} at {lowest[0]:,.0f}, highest {highest[1]:.3g} at {highest[0]:,.0f}."
    )


def _tick_label(value: float) -> str:
    if 1e4 <= abs(value) < 1e7 or (value == int(value) and 1e3 <= abs(value) < 1e4):
        return f"{value:,.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return mantissa.replace("-", "−") + (f"e{int(exponent)}" if exponent else "")
