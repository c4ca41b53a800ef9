"""The geometry of plots: nothing that stands out is lost, nothing is drawn outside, every tick is a round number."""

from __future__ import annotations

import math
import random

import pytest

from llmreg.evaluation.plots import Axis, averaged, curve, drawable, spectrum, thinned


def test_thinning_keeps_every_spike_and_both_ends():
    points = [(float(i), math.sin(i)) for i in range(50_000)]
    points[7_777] = (7_777.0, 100.0)
    points[31_000] = (31_000.0, -100.0)
    kept = thinned(points, 200)
    assert len(kept) <= 402
    assert set(kept) <= set(points)
    assert {points[0], points[7_777], points[31_000], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_a_short_curve_is_drawn_point_by_point():
    points = [(float(i), float(i % 3)) for i in range(100)]
    assert thinned(points, 50) == points


def test_the_mean_of_a_bin_is_its_mean():
    assert averaged([(0.0, 1.0), (1.0, 3.0), (9.0, 5.0), (10.0, 7.0)], 2) == [(0.5, 2.0), (9.5, 6.0)]


def test_values_that_are_not_finite_are_skipped_and_counted():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, -math.inf), (4, 1e300), (5, 2.0)]
    assert drawable(points) == [(0.0, 1.0), (5.0, 2.0)]
    plot = curve("loss", points)
    assert plot.line == "0,1000 1000,0"
    assert plot.note == "4 of 6 values are not finite numbers and are left out."
    assert curve("loss", points[1:5]) is None


@pytest.mark.parametrize("points", [[(3, 2.0)], [(3, 2.0), (9, 2.0)], [(0, 0.0)], [(0, -5.0)], [(5, 1.0), (5, 2.0)]])
def test_constant_and_single_points_are_drawn_inside_the_canvas(points):
    places = [tuple(map(int, place.split(","))) for place in curve("loss", points).line.split()]
    assert len(places) >= 2
    assert all(0 <= coordinate <= 1000 for place in places for coordinate in place)


def test_only_a_noisy_curve_gets_a_mean_drawn_over_it():
    noise = random.Random(0)
    assert curve("loss", [(i, noise.random()) for i in range(500)]).faint
    assert not curve("learning rate", [(i, math.cos(i / 160)) for i in range(500)]).faint


def test_ticks_are_round_and_inside_the_axis():
    assert [tick.label for tick in Axis(0, 20_000).ticks(whole=True)] == ["0", "5,000", "10,000", "15,000", "20,000"]
    assert {"0", "1e-5", "2e-5"} <= {tick.label for tick in Axis(0, 2e-5).ticks(4)}
    assert [tick.label for tick in Axis(-1, 1).ticks(4)] == ["−1", "−0.5", "0", "0.5", "1"]
    assert [tick.label for tick in Axis(1, 30, log=True).ticks()] == ["1", "2", "5", "10", "20"]
    assert Axis(1, 100, log=True).place(10) == pytest.approx(50)


def test_a_spectrum_is_the_median_in_a_band_of_the_layers():
    layers = {"a": [8.0, 4.0, 0.0], "b": [4.0, 2.0], "c": [2.0, 1.0]}
    plot = spectrum("values", layers)
    assert plot.line == "0,333 1000,667"
    assert plot.band == "0,0 1000,333 1000,1000 0,667"
    assert not spectrum("values", {"a": [8.0, 4.0]}).band
    assert spectrum("values", {"a": [0.0, math.nan]}) is None
