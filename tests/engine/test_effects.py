from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

from tests.engine.decided import arms, claim, run, trial, verdict
from trialist.engine.contract import Arm, Endpoint
from trialist.engine.effects import (
    Cell,
    association,
    difference_of_associations,
    interaction,
    ratio,
    slope,
)
from trialist.engine.intervals import Undefined
from trialist.engine.verdict import decide


def grid(effect_size, seeds=5, noise=0.02):
    """Factor arms over task x log_ratio; the metric has main effects, a covariate and the planted interaction."""
    g = np.random.default_rng(0)
    made = [
        Arm(f"{task}-{x}", "factor", options=dict(task=task, log_ratio=x))
        for task in ("copy", "recall")
        for x in (0.0, 1.0, 2.5)
    ]
    records = []
    for seed in range(seeds):
        for arm in made:
            second, x, time = float(arm["task"] == "recall"), arm["log_ratio"], g.uniform(1, 2)
            score = 1 + 0.7 * second - 0.2 * x + 3 * time + effect_size * second * x + noise * g.normal() + 0.1 * seed
            records.append(run(arm.name, seed, {"score": score}, covariates={"time": time}))
    return made, records


def test_interaction_finds_the_planted_coefficient_given_a_covariate():
    made, records = grid(0.5)
    result = verdict(records, made, effect=interaction("task", "log_ratio", given=("time",)))
    assert result.word == "supported"
    assert result.effects[0].low < 0.5 < result.effects[0].high
    assert result.effects[0].n == 5
    assert "interaction of task and log_ratio given time for score is" in result.sentence


def test_an_interaction_that_is_not_there_is_no_effect():
    made, records = grid(0.0)
    assert verdict(records, made, effect=interaction("task", "log_ratio", given=("time",))).word == "no effect"


def test_interaction_per_seed_is_the_difference_of_two_slopes():
    made, records = grid(0.5, seeds=1)
    cells = [Cell(arm, 0, record.outcome) for arm, record in zip(made, records)]
    halves = [
        stats.linregress([c.value("log_ratio") for c in part], [c.value("score") for c in part]).slope
        for part in (cells[:3], cells[3:])
    ]
    assert interaction("task", "log_ratio")(cells, "score") == pytest.approx(halves[1] - halves[0])
    assert slope("log_ratio")(cells[:3], "score") == pytest.approx(halves[0])


def test_too_few_cells_are_undefined_and_not_a_number():
    made, records = grid(0.5, seeds=1)
    cells = [Cell(arm, 0, record.outcome) for arm, record in zip(made, records)]
    with pytest.raises(Undefined, match="do not determine"):
        interaction("task", "log_ratio")(cells[1:4], "score")
    result = verdict(grid(0.5)[1], made, effect=interaction("task", "absent"))
    assert result.word == "inconclusive"
    assert "'absent'" in result.reason


def test_a_lower_is_better_endpoint_turns_a_slope_around():
    made = [Arm(f"x{x}", "factor", options=dict(x=x)) for x in (1, 2, 4)]
    g = np.random.default_rng(0)
    records = [run(arm.name, seed, {"loss": 9.0 - arm["x"] + 0.1 * g.normal()}) for seed in range(4) for arm in made]
    result = verdict(records, made, of=claim(endpoint=Endpoint("loss", better="lower", margin=0.5)), effect=slope("x"))
    assert result.effects[0].effect == pytest.approx(1.0, abs=0.1)
    assert result.word == "supported"


def test_a_diverged_cell_counts_as_the_worst_value_of_the_grid():
    made = [Arm(f"x{x}", "factor", options=dict(x=x)) for x in (1, 2, 4)]
    g = np.random.default_rng(0)
    values = {(a.name, s): 3.0 * a["x"] + 0.1 * g.normal() for a in made for s in range(5)}
    records = [
        run(a.name, s, {} if (a.name, s) == ("x4", 2) else {"score": values[a.name, s]},
            diverged="NaN" if (a.name, s) == ("x4", 2) else None)
        for s in range(5) for a in made
    ]  # fmt: skip
    worst = min(value for key, value in values.items() if key != ("x4", 2))
    values["x4", 2] = worst
    expected = [stats.linregress([1, 2, 4], [values[a.name, s] for a in made]).slope for s in range(5)]
    result = verdict(records, made, effect=slope("x"))
    assert result.effects[0].effect == pytest.approx(np.mean(expected))
    assert result.effects[0].without_diverged[0] == pytest.approx(np.mean(np.delete(expected, 2)))


def test_ratio_is_the_relative_change_per_seed():
    old, new = np.array([2.0, 4.0, 5.0, 8.0]), np.array([2.5, 4.7, 6.5, 9.6])
    records = [run(arm, s, {"score": v[s]}) for arm, v in (("old", old), ("new", new)) for s in range(4)]
    result = verdict(records, arms("old"), effect=ratio())
    expected = stats.ttest_1samp(new / old - 1, 0).confidence_interval(0.95)
    assert (result.effects[0].low, result.effects[0].high) == pytest.approx((expected.low, expected.high))


def models(n, strength, clusters=None, seed=0):
    g = np.random.default_rng(seed)
    size = g.normal(size=n)
    x = 0.8 * size + g.normal(size=n)
    y = 0.8 * size + strength * x + 0.5 * g.normal(size=n)
    made = [Arm(f"m{k}", "factor", options=dict(family=str(k if clusters is None else clusters[k]))) for k in range(n)]
    return made, [
        run(arm.name, 0, {"score": y[k]}, covariates={"x": x[k], "size": size[k]}) for k, arm in enumerate(made)
    ], (x, y, size)  # fmt: skip


def test_association_is_the_rank_correlation_over_models():
    made, records, (x, y, _) = models(14, 1.0)
    result = verdict(records, made, effect=association("x", "score"), replicate="model")
    assert result.effects[0].effect == pytest.approx(stats.spearmanr(x, y).statistic)
    assert result.word == "supported"
    assert "over 14 models" in result.sentence
    expected = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=1_000,
        alternative="less", rng=0,
    )  # fmt: skip
    assert result.effects[0].p_worse == pytest.approx(expected.pvalue, abs=0.02)


def test_association_given_a_covariate_is_the_partial_correlation():
    made, records, (x, y, size) = models(20, 0.0, seed=3)
    cells = [Cell(arm, 0, record.outcome) for arm, record in zip(made, records)]
    r = np.corrcoef([x, y, size])
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    found = association("x", "score", given=("size",), method="pearson").interval(cells)
    assert found.estimate == pytest.approx(partial)
    assert found.low < 0 < found.high


def test_a_model_that_is_copied_within_its_family_adds_nothing():
    made, records, _ = models(10, 0.4)
    cells = [Cell(arm, 0, record.outcome) for arm, record in zip(made, records)]
    once = association("x", "score", cluster="family").interval(cells)
    thrice = association("x", "score", cluster="family").interval([c for c in cells for _ in range(3)])
    assert thrice.n == once.n == 10
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=2e-3)


def test_seven_models_are_too_few_for_an_association():
    made, records, _ = models(7, 2.0)
    result = verdict(records, made, effect=association("x", "score"), replicate="model")
    assert result.word == "inconclusive"
    assert "at least 8" in result.reason
    assert result.advice.startswith("Run 1 more model")


def test_difference_of_associations_is_the_difference_and_sees_an_equal_pair_as_equal():
    made, records, (x, y, size) = models(16, 1.0)
    cells = [Cell(arm, 0, record.outcome) for arm, record in zip(made, records)]
    found = difference_of_associations(association("x", "score"), association("size", "score")).interval(cells)
    assert found.estimate == pytest.approx(stats.spearmanr(x, y).statistic - stats.spearmanr(size, y).statistic)
    same = difference_of_associations(association("x", "score"), association("x", "score")).interval(cells)
    assert not same.defined


def test_a_function_of_the_cells_of_a_seed_is_an_effect_too():
    def worst_cell(cells, endpoint):
        return min(cell.value(endpoint) for cell in cells)

    made, records = grid(0.5)
    result = verdict(records, made, effect=staticmethod(worst_cell))
    assert result.treatment == "worst cell"
    assert result.effects[0].n == 5


def rates(seeds=4, further=lambda arm, seed: {}):
    """Cells over x in two tasks whose log-odds rise by 0.5 with x; the second is harder."""
    g = np.random.default_rng(1)
    made = [Arm(f"{task}-{x}", "factor", options=dict(task=task, x=x)) for task in ("easy", "hard") for x in (0, 1, 3)]
    records = []
    for seed in range(seeds):
        for arm in made:
            log_odds = 0.5 * arm["x"] - 3 * (arm["task"] == "hard") + 0.01 * g.normal()
            records.append(run(arm.name, seed, {"rate": 1 / (1 + np.exp(-log_odds)), **further(arm, seed)}))
    return made, records


RATE = Endpoint("rate", unit="share", margin=0.05, scale="logit")


def test_an_effect_over_cells_is_fitted_on_the_endpoints_scale():
    made, records = rates()
    odds = verdict(records, made, of=claim(endpoint=RATE), effect=interaction("task", "x"))
    assert odds.word == "no effect"
    raw = verdict(records, made, of=claim(endpoint=Endpoint("rate", margin=0.05)), effect=interaction("task", "x"))
    assert raw.word == "contradicted"
    assert odds.effects[0].unit == "log odds"


def test_a_cell_without_a_value_on_the_scale_leaves_the_effect_undefined():
    made, records = rates(further=lambda arm, seed: {"rate": 0.0} if (arm.name, seed) == ("hard-0", 2) else {})
    found = verdict(records, made, of=claim(endpoint=RATE), effect=slope("x"))
    assert found.word == "inconclusive"
    assert "rate of hard-0 is 0" in found.reason


def test_secondary_endpoints_of_a_grid_are_fitted_and_do_not_decide():
    made, records = rates(further=lambda arm, seed: {"length": 4.0 + 2.0 * arm["x"] + 0.1 * seed * arm["x"]})
    length = Endpoint("length", unit="tokens", better="lower")
    found = verdict(records, made, of=claim(endpoint=RATE, secondary=(length,)), effect=slope("x"))
    assert [(effect.endpoint, round(effect.effect, 6)) for effect in found.secondary] == [("length", -2.15)]
    fixed = verdict(records, made, of=claim(endpoint=RATE, secondary=(length,)), effect=slope("x", "rate"))
    assert fixed.secondary == ()  # it is fitted to the rate, whatever the endpoint


@dataclass(frozen=True)
class Doubling:
    """A slope that is counted by doublings and belongs into the sentence."""

    kind: ClassVar[str] = "replicate"
    label: ClassVar[str] = "slope at x up to 1"
    per: ClassVar[str] = "doubling"
    said: bool = True

    def __call__(self, cells, endpoint):
        return slope("x")([cell for cell in cells if cell.arm["x"] <= 1], endpoint)


@pytest.mark.parametrize("said", [True, False])
def test_readings_of_the_same_cells_are_shown_and_the_ones_that_belong_there_said(said):
    made, records = rates()
    found = decide(
        trial(claim(endpoint=RATE), effect=slope("x"), readings=lambda self: (Doubling(said),)), made, records
    )
    (reading,) = found.readings
    assert (reading.control, reading.unit) == ("slope at x up to 1", "log odds per doubling")
    assert reading.low < 0.5 < reading.high
    assert ("(the slope at x up to 1 for the odds of rate is a factor of 1.6" in found.sentence) == said
    assert found.word == verdict(records, made, of=claim(endpoint=RATE), effect=slope("x")).word


def test_what_an_effect_is_counted_by_stands_beside_it_and_beside_the_margin():
    made, records = rates()
    found = decide(trial(claim(endpoint=RATE), effect=Doubling()), made, records)
    assert "a factor of 1.6" in found.sentence
    assert " per doubling (95 % interval" in found.sentence
    assert found.sentence.count("per doubling") == 2
