"""The curve from sums of single losses to the loss of all together."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.budget.curve import Curve, through

POINTS = [(1.0, 2.0), (4.0, 6.0), (16.0, 9.0)]


def test_it_goes_through_its_points_and_straight_between_logarithms() -> None:
    curve = through(POINTS)
    for total, loss in POINTS:
        assert curve.at(total) == pytest.approx(loss)
    assert curve.at(2.0) == pytest.approx(math.sqrt(2.0 * 6.0))
    assert curve.at(8.0) == pytest.approx(math.sqrt(6.0 * 9.0))


def test_small_losses_are_proportional_and_large_ones_go_on_as_before() -> None:
    curve = through(POINTS)
    assert curve.at(0.1) == pytest.approx(0.2)
    assert curve.at(0.0) == 0.0
    assert curve.at(64.0) == pytest.approx(9.0 * 1.5)


def test_without_points_a_sum_is_its_own_loss_and_one_point_scales() -> None:
    assert Curve().at(0.3) == 0.3
    assert through([(2.0, 1.0)]).at(8.0) == pytest.approx(4.0)


def test_points_that_do_not_rise_are_left_out() -> None:
    assert through([(4.0, 3.0), (1.0, 0.0), (2.0, 3.5), (8.0, 5.0)]).points == ((2.0, 3.5), (8.0, 5.0))


def test_points_that_nearly_coincide_make_no_slope() -> None:
    low, high = 1.0007061064243344e-06, 1.0007061064243346e-06
    curve = through([(high, 2.0), (low, 1.0)])
    assert curve.points == ((low, 1.0),)
    assert math.isfinite(curve.at(1e4))


def test_beyond_the_last_point_a_steep_pair_is_not_believed() -> None:
    curve = through([(1.0, 1e-6), (1.1, 1e3)])
    assert curve.at(1.1) == pytest.approx(1e3)
    assert curve.at(2.2) == pytest.approx(1e3 * 2.0**4)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), max_size=6),
    st.floats(0, 1e4),
    st.floats(0, 1e4),
)
def test_more_loss_in_single_linears_is_never_less_together(
    points: list[tuple[float, float]], a: float, b: float
) -> None:
    curve = through(points)
    low, high = sorted((a, b))
    assert curve.at(low) <= curve.at(high) * (1 + 1e-9) + 1e-12
