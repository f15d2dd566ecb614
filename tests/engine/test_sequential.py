from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from trialist.engine.intervals import t_interval
from trialist.engine.sequential import Look, _smallest_p, anytime_threshold, log_e_value, nominal_p


@pytest.mark.parametrize(("looks", "expected"), [((3, 5, 8), 0.0200), (tuple(range(3, 11)), 0.0122)])
def test_nominal_p_reproduces_the_known_designs(looks, expected):
    assert nominal_p(looks) == pytest.approx(expected, abs=0.0004)


def test_one_look_needs_no_correction():
    assert nominal_p((6,)) == 0.05


def test_calibration_is_deterministic_and_fast():
    _smallest_p.cache_clear()
    started = time.process_time()
    first = nominal_p((3, 5, 8))
    assert time.process_time() - started < 2.0
    _smallest_p.cache_clear()
    assert nominal_p((3, 5, 8)) == first


def test_more_looks_cost_more_and_smaller_levels_give_smaller_p():
    assert nominal_p((3, 5, 8)) > nominal_p(tuple(range(3, 11)))
    assert nominal_p((3, 5, 8), 0.10) > nominal_p((3, 5, 8), 0.05) > nominal_p((3, 5, 8), 0.025)


def test_repeated_interval_is_the_t_interval_at_the_nominal_level():
    d = np.random.default_rng(0).normal(size=5)
    interval = t_interval(d, level=Look((3, 5, 8)).level)
    low, high = stats.ttest_1samp(d, 0).confidence_interval(1 - nominal_p((3, 5, 8)))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    low90, _ = stats.ttest_1samp(d, 0).confidence_interval(1 - nominal_p((3, 5, 8), 0.10))
    assert interval.low90 == pytest.approx(low90)


@pytest.mark.parametrize(("n", "threshold"), [(4, 7.21), (5, 5.36), (6, 4.73), (8, 4.20), (10, 3.97), (20, 3.63)])
def test_anytime_thresholds_for_tau_two(n, threshold):
    assert anytime_threshold(n) == pytest.approx(threshold, abs=0.005)


@pytest.mark.parametrize(("n", "threshold"), [(5, 8.45), (6, 5.45), (8, 4.25), (10, 3.87)])
def test_anytime_thresholds_for_tau_one(n, threshold):
    assert anytime_threshold(n, tau=1.0) == pytest.approx(threshold, abs=0.005)


def test_at_the_threshold_the_evidence_is_one_over_alpha():
    assert log_e_value(anytime_threshold(7), 7) == pytest.approx(math.log(20))
    assert log_e_value(0.0, 9, tau=0.0) == 0.0


def test_anytime_interval_needs_four_replicates_and_says_so():
    d = np.random.default_rng(0).normal(size=4) + 3
    three, four = (t_interval(d[:n], level=Look(None).level) for n in (3, 4))
    assert not three.defined
    assert "at least 4" in three.reason
    error = d.std(ddof=1) / 2
    assert four.high - four.estimate == pytest.approx(anytime_threshold(4) * error)


@pytest.mark.parametrize("looks", [(), (2, 5), (5, 3), (3, 3)])
def test_looks_must_rise_from_three_on(looks):
    with pytest.raises(ValueError, match="increasing numbers of seeds"):
        Look(looks)
