from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nap_decode import NapDecodeError
from nap_decode.measure.parallelism import accuracy_under_parallelism


def test_by_hand():
    # W(80) = 1, W(78) = exp(-3 * 2 / 80), W(76) = exp(-3 * 4 / 80)
    w78, w76 = math.exp(-0.075), math.exp(-0.15)
    expected = 1 * 80 + 1.5 * (80 + 78 * w78) / 2 + 0.5 * (78 * w78 + 76 * w76) / 2
    points = [(1, 80), (2.5, 78), (3, 76), (5, 74.9)]  # the last one lost more than five points
    assert accuracy_under_parallelism(points) == pytest.approx(expected)
    assert accuracy_under_parallelism(points[::-1]) == pytest.approx(expected)


def test_the_first_product_has_no_weight_and_the_others_are_measured_against_the_best():
    w = math.exp(-3 * (1 - 60 / 75))
    assert accuracy_under_parallelism([(2, 60)], best=75) == 120
    assert accuracy_under_parallelism([(2, 60), (3, 60)], best=75) == pytest.approx(120 + 60 * w)


def test_a_point_in_the_middle_that_lost_too_much_is_skipped():
    assert accuracy_under_parallelism([(1, 80), (2, 60), (3, 80)]) == 240


def test_a_gain_weighs_at_most_one():
    assert accuracy_under_parallelism([(1, 80), (3, 90)], best=80) == pytest.approx(80 + 2 * (80 + 90) / 2)


def test_options():
    points = [(1, 80), (2, 70)]
    assert accuracy_under_parallelism(points) == 80
    assert accuracy_under_parallelism(points, tolerance=10, alpha=0) == 155
    assert 80 < accuracy_under_parallelism(points, tolerance=10) < 155


def test_of_equal_parallelism_the_best_counts():
    assert accuracy_under_parallelism([(1, 70), (1, 80), (2, 80), (2, 10)]) == 160


def test_nothing_right_is_worth_nothing():
    assert accuracy_under_parallelism([(1, 0), (2, 0)]) == 0


@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.floats(2, 100)), min_size=1, max_size=8),
    st.floats(0, 10),
)
def test_never_above_the_plain_area_nor_below_the_slowest_point(points, alpha):
    points = sorted(dict(points).items())
    area = accuracy_under_parallelism(points, alpha=alpha)
    best = max(accuracy for _, accuracy in points)
    assert points[0][0] * points[0][1] * (1 - 1e-12) <= area <= points[-1][0] * best * (1 + 1e-12)
    if alpha:
        assert area <= accuracy_under_parallelism(points, alpha=alpha / 2) + 1e-9


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([], {}, "there are no points; give"),
        ([(0, 50)], {}, "must be above 0"),
        ([(math.inf, 50)], {}, "tokens per forward pass must be a finite number"),
        ([(1, 101)], {}, "an accuracy in percent must be a number from 0 to 100, but is 101"),
        ([(1, math.nan)], {}, "an accuracy in percent must be"),
        ([(1, 0.9), (2, 0.8)], {}, "must be in percent, but the highest is 0.9; multiply them by 100"),
        ([(1,)], {}, r"a point must be a tuple .*, but is \(1,\)"),
        ([1.0], {}, "a point must be a tuple"),
        ([(1, 50)], {"best": 120}, "best must be a number from 0 to 100"),
        ([(1, 50)], {"alpha": -1}, "alpha must be"),
        ([(1, 50)], {"tolerance": -1}, "tolerance must be"),
    ],
)
def test_errors(points, options, message):
    with pytest.raises(NapDecodeError, match=message):
        accuracy_under_parallelism(points, **options)
