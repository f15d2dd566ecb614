from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trialist.engine import item_intervals
from trialist.engine.intervals import Level, Undefined, crossed_t, holm, holm_adjusted, paired_t, t_interval, to_scale
from trialist.engine.item_intervals import item_interval


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_paired_t_equals_scipy_ttest_rel(n):
    control, treatment = draws(n, seed=n), draws(n, seed=n + 50) + 0.4
    interval, expected = paired_t(control, treatment), stats.ttest_rel(treatment, control)
    for found, level in (((interval.low, interval.high), 0.95), ((interval.low90, interval.high90), 0.90)):
        low, high = expected.confidence_interval(level)
        assert found == pytest.approx((low, high), rel=1e-9)
    assert interval.p_better == pytest.approx(
        stats.ttest_rel(treatment, control, alternative="greater").pvalue, rel=1e-9
    )
    assert interval.p_worse == pytest.approx(stats.ttest_rel(treatment, control, alternative="less").pvalue, rel=1e-9)
    assert (interval.df, interval.n) == (n - 1, n)


def test_p_value_of_a_shifted_hypothesis_is_the_t_test_of_shifted_values():
    d = draws(6) + 0.3
    interval = t_interval(d)
    assert interval.p_above(-0.2) == pytest.approx(stats.ttest_1samp(d, -0.2, alternative="greater").pvalue)
    assert interval.p_below(0.9) == pytest.approx(stats.ttest_1samp(d, 0.9, alternative="less").pvalue)


def test_the_level_is_a_parameter():
    d = draws(5)
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.98)
    interval = t_interval(d, level=Level(0.01))
    assert (interval.low, interval.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("differences", "reason"),
    [([], "0 seeds"), ([0.3], "1 seed: no variance"), ([0.0] * 5, "exactly 0"), ([0.3] * 4, "do not vary")],
)
def test_what_has_no_variance_has_no_interval_but_a_reason(differences, reason):
    interval = t_interval(differences)
    assert (interval.low, interval.high, interval.p_better) == (None, None, None)
    assert reason in interval.reason
    assert interval.p_above(0.0) == interval.p_below(0.0) == 1.0


def test_a_constant_shift_is_not_given_the_variance_of_its_rounding():
    control = np.array([3.1, 3.7, 2.9, 3.3])
    assert not paired_t(control, control + 0.1).defined


def crossed_by_hand(d):
    """Sums of squares with loops, and the wider interval."""
    s, n = d.shape
    grand = sum(sum(row) for row in d) / (s * n)
    rows = [sum(d[a]) / n for a in range(s)]
    columns = [sum(d[a][b] for a in range(s)) / s for b in range(n)]
    v_s = sum((r - grand) ** 2 for r in rows) / (s - 1) / s
    v_i = sum((c - grand) ** 2 for c in columns) / (n - 1) / n
    rest = sum((d[a][b] - rows[a] - columns[b] + grand) ** 2 for a in range(s) for b in range(n))
    v_r = rest / ((s - 1) * (n - 1)) / (s * n)
    v = max(v_s + v_i - v_r, v_s, v_i)
    df = min(max(v**2 / (v_s**2 / (s - 1) + v_i**2 / (n - 1)), s - 1), s * n)
    crossed, seeds = stats.t.ppf(0.975, df) * math.sqrt(v), stats.t.ppf(0.975, s - 1) * math.sqrt(v_s)
    return grand, max(crossed, seeds), crossed > seeds


@pytest.mark.parametrize(("seed_noise", "item_noise"), [(1.0, 0.01), (0.0, 2.0), (0.5, 0.5)])
def test_crossed_interval_equals_the_wider_of_two_by_hand(seed_noise, item_noise):
    d = 0.2 + seed_noise * draws(4, 1, seed=1) + item_noise * draws(1, 11, seed=2) + 0.3 * draws(4, 11, seed=3)
    grand, half, _ = crossed_by_hand(d)
    interval = crossed_t(d)
    assert (interval.low, interval.high) == pytest.approx((grand - half, grand + half))


def test_crossed_interval_is_sometimes_the_seed_t_and_sometimes_the_crossed_one():
    worlds = [
        a * draws(4, 1, seed=1) + b * draws(1, 11, seed=2) + 0.3 * draws(4, 11, seed=3) for a, b in ((1, 0.01), (0, 2))
    ]
    assert [crossed_by_hand(d)[2] for d in worlds] == [False, True]
    assert crossed_t(worlds[0]).df == 3


def test_items_that_are_their_own_clusters_change_nothing():
    d = draws(3, 13)
    alone = crossed_t(d, [str(k) for k in range(13)])
    assert (alone.low, alone.high) == pytest.approx((crossed_t(d).low, crossed_t(d).high))
    few = item_interval(d[0], list("abcdefghijklm"))
    assert few.high == pytest.approx(item_interval(d[0]).high)


def test_copies_of_an_item_in_one_cluster_do_not_narrow_the_interval():
    d = draws(9)
    one, five = item_interval(d), item_interval(np.repeat(d, 5), np.repeat([str(k) for k in range(9)], 5))
    assert (five.low, five.high, five.n) == (pytest.approx(one.low), pytest.approx(one.high), 9)
    seeds = draws(4, 9)
    copied = crossed_t(np.repeat(seeds, 5, axis=1), np.repeat([str(k) for k in range(9)], 5))
    assert copied.high == pytest.approx(crossed_t(seeds).high)


def test_below_twenty_clusters_the_interval_over_items_is_a_t_interval():
    d = draws(19)
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert (item_interval(d).low, item_interval(d).high) == pytest.approx((low, high))


def test_bca_is_close_to_that_of_scipy(monkeypatch):
    d = np.exp(draws(60, seed=4))
    expected = stats.bootstrap((d,), np.mean, n_resamples=9_999, method="BCa", rng=1).confidence_interval
    interval = item_interval(d)
    t_low, t_high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert interval.high == pytest.approx(expected.high, rel=0.02)
    assert interval.high > t_high
    assert interval.low == pytest.approx(min(t_low, expected.low), rel=0.02)


@pytest.mark.parametrize("n", [12, 40])
def test_a_bound_and_the_p_value_at_it_agree(n):
    interval = item_interval(draws(n, seed=n) + 0.2)
    assert interval.p_above(interval.low) == pytest.approx(0.025, abs=0.003)
    assert interval.p_below(interval.high) == pytest.approx(0.025, abs=0.003)


@pytest.mark.parametrize("make", [t_interval, item_interval, lambda d: crossed_t(np.outer([1, 1.3, 0.8], d))])
def test_order_and_unit_of_the_replicates_change_nothing(make):
    d = draws(25, seed=9) + 0.3
    first, shuffled, scaled = make(d), make(np.random.default_rng(1).permutation(d)), make(1000.0 * d)
    assert (shuffled.low, shuffled.high) == pytest.approx((first.low, first.high), rel=1e-9)
    assert (scaled.low / 1000, scaled.high / 1000) == pytest.approx((first.low, first.high), rel=1e-9)


def test_resampling_is_the_same_every_time():
    d = draws(45)
    assert item_interval(d).low == item_interval(d).low
    assert item_intervals.BCA_FROM == 20


@pytest.mark.parametrize(
    ("p", "adjusted", "at_5_percent"),
    [
        ((0.01, 0.04, 0.03, 0.005), (0.03, 0.06, 0.06, 0.02), (True, False, False, True)),
        ((0.04,), (0.04,), (True,)),
        ((0.02, 0.02, 0.02), (0.06, 0.06, 0.06), (False, False, False)),
        ((0.9, 0.001), (0.9, 0.002), (False, True)),
    ],
)
def test_holm_on_fixed_vectors(p, adjusted, at_5_percent):
    assert holm_adjusted(p) == pytest.approx(adjusted)
    assert holm(p, 0.05) == at_5_percent


def test_scales_are_the_logarithm_and_the_log_odds():
    assert to_scale([1.0, math.e], "log") == pytest.approx([0.0, 1.0])
    assert to_scale([0.5, 0.75], "logit") == pytest.approx([0.0, math.log(3)])


@pytest.mark.parametrize(("value", "scale"), [(0.0, "log"), (-1.0, "log"), (1.0, "logit"), (0.0, "logit")])
def test_a_value_without_a_logarithm_is_undefined_with_its_name(value, scale):
    with pytest.raises(Undefined, match="accuracy is"):
        to_scale([0.5, value], scale, "accuracy")
