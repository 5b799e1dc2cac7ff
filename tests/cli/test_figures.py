"""Charts drawn with Pillow alone: axes that can be read for every range of values."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cmap_defense.cli.figures import Curve, _labels, _ticks, chart_row

VALUES = st.floats(-1e9, 1e9)


@given(low=VALUES, size=st.floats(0, 1e9))
@example(low=0.0, size=0.0)
@example(low=4876.57, size=0.0)
@example(low=4876.571, size=1e-6)
@example(low=-1e9, size=1e-3)
@example(low=1e-9, size=1e-12)
def test_ticks_enclose_the_values_and_read_differently(low: float, size: float) -> None:
    high = low + size
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert min(steps) > 0
    assert ticks[0] <= low + 1e-6 * min(steps)
    assert high <= ticks[-1] + 1e-6 * min(steps)
    labels = _labels(ticks)
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(ticks, abs=0.02 * min(steps))


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (3.2, 27.0, ["0", "5", "10", "15", "20", "25", "30"]),
        (4876.5, 4876.9, ["4876.5", "4876.6", "4876.7", "4876.8", "4876.9"]),
        (0.0, 9.5e-6, ["0e+00", "2e-06", "4e-06", "6e-06", "8e-06", "1e-05"]),
    ],
)
def test_labels_have_as_many_digits_as_they_need(low: float, high: float, labels: list[str]) -> None:
    assert _labels(_ticks(low, high)) == labels


@given(last=st.integers(1, 2000))
def test_ticks_of_iterations_are_whole(last: int) -> None:
    assert all(tick == math.floor(tick) for tick in _ticks(0, last, least=1))


@pytest.mark.parametrize("values", [[4876.57], [1.0, 1.0], [3.0, 1.0, 2.0]])
def test_a_curve_shows_even_as_a_single_point(values: list[float]) -> None:
    drawn = chart_row({"a": [Curve("loss", values, "#ff0000")]}, x_label="x", targets={})
    below = drawn.crop((0, 58, drawn.width, drawn.height))
    assert any(pixel == (255, 0, 0) for _, pixel in below.getcolors(10**6))
