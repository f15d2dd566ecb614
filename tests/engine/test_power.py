from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trialist.engine.intervals import crossed_t, t_interval
from trialist.engine.power import detectable_effect, least_number, power_at, project, seeds_needed

TABLE = {3: 3.26, 4: 2.13, 5: 1.68, 6: 1.43, 8: 1.16, 10: 1.00, 16: 0.75, 20: 0.66}


@pytest.mark.parametrize("n", TABLE)
def test_detectable_effect_reproduces_the_table(n):
    assert detectable_effect(n) == pytest.approx(TABLE[n], abs=0.006)


@pytest.mark.parametrize(("n", "effect"), [(4, 1.0), (9, 0.7), (25, 0.3)])
def test_power_equals_the_noncentral_t(n, effect):
    critical, shift = stats.t.ppf(0.975, n - 1), effect * np.sqrt(n)
    expected = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert power_at(effect, n) == pytest.approx(expected, abs=1e-4)


def test_the_seeds_needed_for_a_detectable_effect_are_those_it_belongs_to():
    assert [seeds_needed(detectable_effect(n) + 1e-9) for n in TABLE] == list(TABLE)


def test_projected_seed_interval_shrinks_like_the_square_root():
    interval = t_interval(np.random.default_rng(0).normal(size=5) + 1)
    grown = project(interval, seeds=20)
    assert grown.estimate == interval.estimate
    assert grown.high - grown.estimate == pytest.approx(stats.t.ppf(0.975, 19) * interval.standard_error / 2)


def test_projection_to_the_same_size_changes_little():
    d = np.random.default_rng(1).normal(size=(6, 30)) + np.random.default_rng(2).normal(size=(6, 1))
    interval = crossed_t(d)
    assert project(interval, seeds=6, items=30).high == pytest.approx(interval.high, rel=0.02)


def test_items_alone_cannot_remove_the_noise_of_seeds():
    g = np.random.default_rng(1)
    interval = crossed_t(g.normal(size=(6, 1)) + 0.1 * g.normal(size=(6, 30)))
    width = interval.high - interval.low
    many_items, many_seeds = project(interval, items=30_000), project(interval, seeds=600)
    assert many_items.high - many_items.low > 0.9 * width
    assert many_seeds.high - many_seeds.low < 0.15 * width


def test_least_number_finds_the_first_that_decides():
    assert least_number(lambda n: n >= 37, 5, 1000) == 37
    assert least_number(lambda n: n >= 6, 5, 1000) == 6
    assert least_number(lambda n: False, 5, 1000) is None
    assert least_number(lambda n: n >= 1000, 5, 1000) == 1000
