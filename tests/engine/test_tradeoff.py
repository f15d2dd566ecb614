from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import pchip_interpolate

from trialist.engine.contract import Outcome
from trialist.engine.tradeoff import area, value_at

POINTS = [(4.0, 0.70), (1.0, 0.20), (2.0, 0.55), (8.0, 0.72)]


def test_a_straight_line_is_read_exactly():
    line = [(0.0, 1.0), (1.0, 3.0), (3.0, 7.0)]
    assert value_at(line, 2.0).value == pytest.approx(5.0)
    assert area(line, (0.5, 2.5)).value == pytest.approx(4.0)


def test_a_curve_is_interpolated_monotonically():
    x, y = zip(*sorted(POINTS))
    assert value_at(POINTS, 3.0).value == pytest.approx(float(pchip_interpolate(x, y, 3.0)))
    heights = [value_at(POINTS, x).value for x in np.linspace(1, 8, 200)]
    assert (np.diff(heights) >= 0).all()


def test_the_area_is_the_mean_height():
    grid = np.linspace(1.5, 7.0, 300)
    expected = np.mean([value_at(POINTS, x).value for x in grid])
    assert area(POINTS, (1.5, 7.0)).value == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (POINTS, "covers 1 to 8 and not 0.5 to 4"),
        ([(1.0, 2.0)], "1 point;"),
        ([], "0 points"),
        ([(0, 1), (9, float("nan"))], "finite"),
    ],
)
def test_a_curve_that_does_not_tell_is_undefined_with_the_reason(points, reason):
    reading = area(points, (0.5, 4.0))
    assert reading.value is None
    assert reason in reading.reason


def test_a_reading_goes_into_an_outcome_as_value_or_as_reason():
    assert Outcome(**value_at(POINTS, 4.0).entry("accuracy")).metrics == {"accuracy": pytest.approx(0.70)}
    assert "covers" in Outcome(**value_at(POINTS, 9.0).entry("accuracy")).undefined["accuracy"]


def test_points_at_one_place_count_as_their_mean():
    assert value_at([(0, 0), (1, 1), (1, 3), (2, 4)], 1.0).value == pytest.approx(2.0)


def test_a_range_must_have_a_width():
    with pytest.raises(ValueError, match="low < high"):
        area(POINTS, (4.0, 4.0))
