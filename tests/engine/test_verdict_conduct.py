"""Fair and complete, or void; what divergence, other settings and items do to a verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.decided import SCORE, Given, and_cost, and_metric, arms, base, claim, items, run, runs, trial, verdict
from trialist.engine.contract import Arm, Budget, Cost, Endpoint, Saving
from trialist.engine.contrasts import contrast_items
from trialist.engine.intervals import paired_t
from trialist.engine.records import RunRecord
from trialist.engine.rules import Evidence, word_for
from trialist.engine.verdict import decide

CLEAR = (0.2, 0.3, 0.3, 0.4)
NOTHING = (-0.01, 0.0, 0.0, 0.01)
OPEN = (-0.1, 0.1, 0.1, 0.5)


def spending(records, **steps):
    return [replace(r, outcome=replace(r.outcome, cost=Cost(steps=steps.get(r.arm, 100)))) for r in records]


def test_a_control_with_less_budget_makes_the_trial_void():
    result = verdict(spending(runs(old=CLEAR), old=99))
    assert result.word == "void"
    assert "old got 99 steps and new 100" in result.reason
    assert result.sentence.startswith("the comparison does not count: unequal budget")


def test_a_treatment_with_less_budget_is_fine():
    assert verdict(spending(runs(old=CLEAR), new=60)).word == "supported"


def test_the_tolerance_of_the_budget_is_kept():
    records = spending(runs(old=CLEAR), old=98)
    assert verdict(records, budget=Budget("steps", tolerance=0.02)).word == "supported"
    assert verdict(records, budget=Budget("steps", tolerance=0.01)).word == "void"


def test_a_budget_that_was_not_measured_makes_the_trial_void():
    result = verdict(runs(old=CLEAR), budget=Budget("flops"))
    assert "flops was not measured" in result.reason


def test_unequal_tuning_makes_the_trial_void():
    result = verdict(runs(old=CLEAR), tuning_equal=False, tuning_note="old had 3 tries, new 6")
    assert (result.word, result.reason) == ("void", "unequal tuning: old had 3 tries, new 6")


def test_a_missing_run_of_a_deciding_arm_makes_the_trial_void():
    records = [r for r in runs(old=CLEAR) if (r.arm, r.seed) != ("old", 2)]
    result = verdict(records)
    assert result.word == "void"
    assert "old, seed 2 (has not run)" in result.reason


def test_a_crashed_run_is_named_with_its_error():
    records = [r for r in runs(old=CLEAR) if (r.arm, r.seed) != ("new", 1)]
    records.append(RunRecord("x", "given", "new", "main", 1, "failed", error="MemoryError: 12 GiB\nmore"))
    result = verdict(records)
    assert "new, seed 1 (MemoryError: 12 GiB)" in result.reason


def test_a_missing_reference_run_is_said_and_does_not_decide():
    made = [*arms("old"), Arm("full", "reference")]
    records = [*runs(old=CLEAR), *(run("full", seed, {"score": 9.0 + seed}) for seed in range(3))]
    result = verdict(records, made, expected=[(arm.name, "main", seed) for arm in made for seed in range(4)])
    assert result.word == "supported"
    assert any("full, seed 3" in threat for threat in result.threats)
    assert result.references[0].n == 3


def test_stale_and_tuning_runs_do_not_count():
    records = runs(old=CLEAR)
    records += [replace(r, outcome=replace(r.outcome, metrics={"score": -99.0}), purpose="tuning") for r in records[:1]]
    records += [replace(r, outcome=replace(r.outcome, metrics={"score": -99.0}), status="stale") for r in records[:1]]
    assert verdict(records).effects == verdict(runs(old=CLEAR)).effects


def test_a_control_below_its_sanity_floor_makes_the_trial_void():
    of = claim(endpoint=replace(SCORE, floor=20.0))
    result = verdict(runs(old=CLEAR), of=of)
    assert result.word == "void"
    assert "old fails its sanity floor" in result.reason
    upper = claim(endpoint=Endpoint("score", better="lower", margin=0.1, floor=20.0))
    assert verdict(runs(sign=-1.0, old=CLEAR), of=upper).word == "supported"


@pytest.mark.parametrize(
    ("null", "word", "verdict_word"),
    [
        (NOTHING, "shown null", "supported"),
        ((-0.5, -0.4, -0.6, -0.3), "shown null", "supported"),
        (CLEAR, "effect shown", "void"),
        (OPEN, "undecided", "supported"),
    ],
)
def test_a_negative_control_is_judged_and_voids_when_it_shows_the_effect(null, word, verdict_word):
    result = verdict([*runs(old=CLEAR), *runs("shuffled", old=null)], arms("old", shuffled=["old"]))
    assert result.word == verdict_word
    assert [effect.null_word for effect in result.null_effects] == [word]
    assert any("undecided" in threat for threat in result.threats) == (word == "undecided")


def test_other_settings_are_shown_and_do_not_decide():
    made = [*arms("old"), Arm("old", "control", setting="far"), Arm("new", "treatment", setting="far")]
    result = verdict([*runs(old=CLEAR), *runs("far", old=[-g for g in CLEAR])], made)
    assert result.word == "supported"
    assert [(effect.setting, effect.effect) for effect in result.settings] == [("far", pytest.approx(-0.3))]


def test_the_setting_marked_primary_decides():
    made = [
        *arms("old"),
        *(Arm(n, r, setting="far", primary=True) for n, r in (("old", "control"), ("new", "treatment"))),
    ]
    result = verdict([*runs(old=CLEAR), *runs("far", old=[-g for g in CLEAR])], made)
    assert (result.word, result.setting) == ("contradicted", "far")


def diverging(records, arm, *seeds):
    return [
        replace(r, status="diverged", outcome=replace(r.outcome, metrics={}, diverged="NaN at step 7"))
        if r.arm == arm and r.seed in seeds
        else r
        for r in records
    ]


def test_a_diverged_run_counts_as_the_worst_finite_value_of_its_setting():
    gaps = (1.0, 2.0, 1.5, 1.2, 1.8)
    records = diverging(runs(old=gaps), "old", 3)
    new = [base(seed) for seed in range(5)]
    old = [base(seed) - gap for seed, gap in enumerate(gaps)]
    old[3] = min(value for k, value in enumerate(old) if k != 3)
    expected = paired_t(old, new)
    result = verdict(records)
    assert (result.effects[0].low, result.effects[0].high) == pytest.approx((expected.low, expected.high))
    kept = [0, 1, 2, 4]
    without = paired_t([old[k] for k in kept], [new[k] for k in kept])
    assert result.effects[0].without_diverged == pytest.approx((without.estimate, without.low, without.high))
    assert result.divergences == {"old": 1, "new": 0}
    assert result.word == "supported"


def test_when_the_word_hangs_on_diverged_runs_it_is_inconclusive():
    # The worst value is 5 - 0.3 = 4.7, so the last gap becomes 0.96: 0.465 with an interval of +- 0.525; without: clear.
    result = verdict(diverging(runs(old=(0.3, 0.31, 0.29, 0.3)), "old", 3))
    assert result.word == "inconclusive"
    assert "`inconclusive` with diverged runs counted as the worst value, `supported` without them" in result.reason


def test_a_treatment_that_diverges_more_often_is_never_supported():
    # The treatment's worst value still beats every control, so only the count of divergences speaks against it.
    gaps = (8.0, 8.1, 7.9, 8.2, 8.0, 7.8)
    assert verdict(runs(old=gaps)).word == "supported"
    result = verdict(diverging(runs(old=gaps), "new", 2))
    assert result.word == "inconclusive"
    assert "new diverged in 1 runs and old in 0" in result.reason
    assert result.advice.startswith("Find out why it diverges")


def test_both_arms_diverging_equally_is_allowed():
    gaps = (8.0, 8.1, 7.9, 8.2, 8.0, 7.8)
    records = diverging(diverging(runs(old=gaps), "new", 2), "old", 4)
    assert verdict(records).effects[0].without_diverged is not None
    assert "diverged in" not in verdict(records).reason


def with_items(scores, metric="score"):
    """scores: arm -> seed -> list of item scores."""
    return [
        run(arm, seed, {}, items={metric: row if not isinstance(row, list) else items(row)})
        for arm, rows in scores.items()
        for seed, row in enumerate(rows)
    ]


def item_scores(n, seeds=1, gain=0.4, seed=0):
    g = np.random.default_rng(seed)
    old = g.normal(size=(seeds, n))
    new = old + gain + 0.3 * g.normal(size=(1, n)) + 0.1 * g.normal(size=(seeds, n))
    return {"old": old.tolist(), "new": new.tolist()}


def test_items_of_a_given_model_are_the_replicates_where_declared():
    result = verdict(with_items(item_scores(17)), replicate="item")
    assert (result.word, result.effects[0].n) == ("supported", 17)
    assert "for this model, over 17 items" in result.sentence
    assert "17 test items only" in " ".join(result.threats)


def test_seeds_and_items_together_are_said_in_the_sentence():
    result = verdict(with_items(item_scores(150, seeds=4)), replicate="seed x item")
    assert result.word == "supported"
    assert "over 4 training seeds and 150 items" in result.sentence
    assert "crossed t" in result.effects[0].method


def test_the_order_of_items_does_not_matter():
    scores = item_scores(17)
    records = with_items(scores)
    turned = replace(
        items(scores["old"][0]), ids=tuple(f"q{k}" for k in range(16, -1, -1)), scores=tuple(scores["old"][0][::-1])
    )
    records[0] = run("old", 0, {}, items={"score": turned})
    assert verdict(records, replicate="item").effects == verdict(with_items(scores), replicate="item").effects


def test_different_items_make_the_trial_void():
    scores = item_scores(17)
    records = with_items(scores)
    records[1] = run("new", 0, {}, items={"score": items(scores["new"][0][:-1])})
    result = verdict(records, replicate="item")
    assert result.word == "void"
    assert "different items" in result.reason
    assert "q16" in result.reason


def test_two_clusters_of_items_give_no_verdict():
    scores = {arm: [items(rows[0], ["a"] * 9 + ["b"] * 8)] for arm, rows in item_scores(17).items()}
    result = verdict(with_items(scores), replicate="item")
    assert result.word == "inconclusive"
    assert "at least 3" in result.sentence


def test_more_items_are_the_cheaper_way_where_items_make_the_noise():
    g = np.random.default_rng(3)
    old = np.zeros((5, 12)) + np.arange(5)[:, None]
    new = old + 0.3 + 1.0 * g.normal(size=(1, 12)) + 0.01 * g.normal(size=(5, 12))
    result = verdict(with_items({"old": old.tolist(), "new": new.tolist()}), replicate="seed x item")
    assert result.word == "inconclusive"
    assert "more items" in result.advice
    assert "more seeds" not in result.advice


def test_a_single_run_settles_a_counted_saving_of_a_given_model():
    of = claim(kind="non-inferiority", saving=Saving("bytes", least=0.4))
    records = and_cost(with_items(item_scores(30, gain=0.0)), old=100.0, new=50.0)
    result = verdict(records, replicate="item", of=of, margin=1.0)
    assert result.word == "supported"
    assert "saves 50 % of bytes (counted" in result.sentence


def test_a_saving_per_item_gets_an_interval_over_items():
    of = claim(kind="non-inferiority", saving=Saving("generated_tokens", least=0.2))
    g = np.random.default_rng(1)
    tokens = {"old": g.integers(80, 120, 30).astype(float), "new": g.integers(40, 60, 30).astype(float)}
    records = [
        replace(r, outcome=replace(r.outcome, items={**r.outcome.items, "generated_tokens": items(tokens[r.arm])}))
        for r in with_items(item_scores(30, gain=0.0))
    ]
    saving = verdict(records, replicate="item", of=of, margin=1.0).savings[0]
    share = tokens["new"].sum() / tokens["old"].sum()
    residual = tokens["new"] - share * tokens["old"]
    error = np.sqrt(30 / 29 * (residual**2).sum()) / tokens["old"].sum()
    assert saving.effect == pytest.approx(1 - share)
    assert saving.low == pytest.approx(1 - share - 2.04523 * error, abs=1e-6)


def test_two_score_lists_compare_without_a_trial():
    scores = item_scores(40)
    contrast = contrast_items(items(scores["old"][0]), items(scores["new"][0]), replace(SCORE, margin=0.2))
    assert contrast.effect().effect == pytest.approx(np.mean(np.subtract(scores["new"][0], scores["old"][0])))
    assert word_for(Evidence(((contrast,),))).word == "supported"
    with pytest.raises(ValueError, match="1 items only in the control"):
        contrast_items(items(scores["old"][0]), items(scores["new"][0][:-1]), SCORE)


def curved(records, **curves):
    return [replace(r, outcome=replace(r.outcome, curves={"score": curves[r.arm]})) for r in records]


def test_the_gain_is_expressed_in_budget_of_the_control():
    # The control reaches 4 at step 150 of 200; the treatment ends with 4 at 100 and passes 5 (never reached) nowhere.
    records = curved(runs(old=CLEAR), old=((0, 1.0), (100, 3.0), (200, 3.5)), new=((0, 1.0), (50, 3.0), (100, 3.25)))
    text = verdict(records).cost_equivalent
    assert text is None
    records = curved(runs(old=CLEAR), old=((0, 1.0), (100, 3.0), (200, 3.5)), new=((0, 1.0), (50, 3.0), (100, 4.0)))
    text = verdict(records).cost_equivalent
    assert "old does not reach that value within its 200 steps" in text
    # 3.5 lies half way from step 50 to 100: 75 of the control's 200 steps.
    assert "new reaches the final value of old at 38 % of its steps" in text


def test_a_control_that_was_once_as_good_gives_the_factor():
    records = curved(runs(old=CLEAR), old=((0, 1.0), (100, 3.0), (150, 5.0), (200, 3.5)), new=((0, 1.0), (100, 4.0)))
    assert "old needs 1.2 times the steps for the same value" in verdict(records).cost_equivalent


def test_cost_ratio_is_the_mean_over_seeds_of_treatment_over_control():
    records = [
        replace(r, measured={"wall_seconds": 10.0 * (1 + r.seed) * (1.5 if r.arm == "new" else 1.0)})
        for r in runs(old=CLEAR)
    ]
    assert verdict(records).cost_ratio["wall_seconds"] == pytest.approx(1.5)


def test_arms_that_cannot_be_decided_are_refused():
    with pytest.raises(ValueError, match="one treatment"):
        decide(trial(), [Arm("old", "control")], runs(old=CLEAR))
    twice = [*arms("old"), Arm("newer", "treatment")]
    with pytest.raises(ValueError, match="exactly one"):
        decide(trial(), twice, runs(old=CLEAR))


def test_no_run_at_all_is_void():
    assert decide(Given(), arms("old"), []).reason == "no run has finished"


def test_every_control_counts_for_excess_divergence_not_only_the_first():
    gaps = (8.0, 8.1, 7.9, 8.2, 8.0, 7.8)
    records = diverging(diverging(runs(a=gaps, b=gaps), "new", 2), "a", 1)
    assert "b in 0" in verdict(records, arms("a", "b")).reason


def test_a_guard_without_values_keeps_the_verdict_open():
    guard = Endpoint("accuracy", margin=0.1, needs="gold")
    result = verdict(runs(old=CLEAR), of=claim(guards=(guard,)))
    assert result.word == "inconclusive"
    assert "reports no accuracy" in result.reason
    assert verdict(and_metric(runs(old=CLEAR), "accuracy", old=NOTHING), of=claim(guards=(guard,))).word == "supported"
