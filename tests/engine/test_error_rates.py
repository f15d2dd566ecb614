"""Coverage and false verdicts over simulated trials. The slow tests print nothing: benchmarks/verdict_statistics.py does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trialist.engine.sequential import Look

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import verdict_statistics as simulate

DESIGNS = {
    "fixed": ((6,), None),
    "three": ((3,), None),
    "looks": ((3, 5, 8), Look((3, 5, 8))),
    "every": (tuple(range(3, 11)), Look(tuple(range(3, 11)))),
    "any": (tuple(range(4, 13)), Look(None)),
}


def test_seed_intervals_cover_as_stated_with_few_repeats():
    assert 93.0 < simulate.seed_coverage(5, truth=0.7, repeats=3_000).covered < 97.0


def test_crossed_intervals_cover_as_stated_with_few_repeats():
    assert simulate.crossed_coverage(3, "both", items=20, repeats=1_000).covered > 92.5


@pytest.mark.parametrize("design", ["fixed", "looks"])
def test_noise_is_rarely_called_an_effect_with_few_trials(design):
    looks, look = DESIGNS[design]
    assert simulate.wins(simulate.words(simulate.normal, 0.0, looks, look, trials=150)) <= 6.0


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
def test_seed_intervals_cover_93_5_to_96_5_percent(n):
    assert 93.5 <= simulate.seed_coverage(n, truth=0.7).covered <= 96.5


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("world", ["seed noise", "item noise", "both"])
def test_crossed_intervals_cover_93_5_to_99_percent(n, world):
    assert 93.5 <= simulate.crossed_coverage(n, world).covered <= 99.0


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_false_supported_stays_below_3_6_percent_over_2000_trials(design):
    looks, look = DESIGNS[design]
    assert simulate.wins(simulate.words(simulate.normal, 0.0, looks, look)) <= 3.6


@pytest.mark.slow
@pytest.mark.parametrize("design", ["fixed", "looks"])
def test_false_non_inferiority_stays_below_3_6_percent(design):
    looks, look = DESIGNS[design]
    of = simulate.SimulatedNonInferiority()
    assert simulate.wins(simulate.words(simulate.normal, -1.0, looks, look, of=of)) <= 3.6


@pytest.mark.slow
@pytest.mark.parametrize("world", ["seed noise", "item noise", "both"])
def test_false_supported_over_seeds_and_items_stays_below_3_6_percent(world):
    assert simulate.wins(simulate.crossed_words(3, world)) <= 3.6


@pytest.mark.slow
@pytest.mark.parametrize("design", ["fixed", "three", "looks"])
@pytest.mark.parametrize(
    "draw", [simulate.heavy, simulate.one_in_three, simulate.skewed_lottery], ids=lambda f: f.__name__
)
def test_false_supported_stays_below_5_percent_for_heavy_tails_and_two_modes(design, draw):
    looks, look = DESIGNS[design]
    assert simulate.wins(simulate.words(draw, 0.0, looks, look)) <= 5.0


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [20, 50])
def test_false_supported_over_items_stays_below_3_6_percent(clusters):
    assert simulate.item_coverage(clusters, simulate.normal).too_high <= 3.6


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 6])
def test_the_stated_power_is_reached(n):
    assert 77.0 <= simulate.power(n) <= 83.0
