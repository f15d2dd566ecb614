"""Every branch of the verdict, on differences worked by hand. The margin is 0.1; t at 97.5 %: 4.303 (n=3), 3.182 (n=4)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.decided import MARGIN, NON_INFERIOR, SCORE, and_cost, and_metric, arms, claim, runs, verdict
from trialist.engine.contract import Endpoint, Saving
from trialist.engine.sequential import Look

# mean 0.30, sd 0.0816, standard error 0.0408: 0.30 - 3.182 * 0.0408 = 0.170
CLEAR = (0.2, 0.3, 0.3, 0.4)
# mean 0.05, sd 0.0082: 0.037 to 0.063
SLIGHT = (0.04, 0.05, 0.05, 0.06)
# mean 0, sd 0.0082; 90 %: 2.353 * 0.0041 = 0.0096
NOTHING = (-0.01, 0.0, 0.0, 0.01)
# mean 0.15, sd 0.2517: 0.15 - 3.182 * 0.1258 = -0.250
OPEN = (-0.1, 0.1, 0.1, 0.5)
WORSE = tuple(-value for value in CLEAR)
SLIGHTLY_WORSE = tuple(-value for value in SLIGHT)
# 90 % interval reaches over the margin, 95 % interval below 0: mean -0.08, standard error 0.0122
WORSE_BELOW_MARGIN = (-0.11, -0.09, -0.07, -0.05)

GUARD = Endpoint("accuracy", better="higher", margin=0.1)
SECOND = Endpoint("speed", better="higher", margin=0.1)


def test_supported_when_every_lower_bound_is_above_zero_and_every_estimate_reaches_the_margin():
    result = verdict(runs(a=CLEAR, b=CLEAR[::-1]), arms("a", "b"))
    assert result.word == "supported"
    assert result.effects[0].low == pytest.approx(0.30 - 3.18245 * 0.0408248, abs=1e-5)
    assert [effect.control for effect in result.effects] == ["a", "b"]


def test_one_control_that_is_not_beaten_takes_the_support_away():
    assert verdict(runs(a=CLEAR, b=OPEN), arms("a", "b")).word == "inconclusive"


def test_small_when_the_effect_is_sure_but_below_the_margin():
    assert verdict(runs(old=SLIGHT)).word == "small"
    assert verdict(runs(a=CLEAR, b=SLIGHT), arms("a", "b")).word == "small"


def test_the_margin_can_be_replaced():
    assert verdict(runs(old=SLIGHT), margin=0.05).word == "supported"
    assert verdict(runs(old=CLEAR), margin=0.31).word == "small"


def test_contradicted_when_worse_by_at_least_the_margin_against_one_control():
    assert verdict(runs(old=WORSE)).word == "contradicted"
    assert verdict(runs(a=CLEAR, b=WORSE), arms("a", "b")).word == "contradicted"


def test_worse_by_less_than_the_margin_is_no_effect_or_open_but_not_contradicted():
    assert verdict(runs(old=SLIGHTLY_WORSE)).word == "no effect"
    assert verdict(runs(old=WORSE_BELOW_MARGIN)).word == "inconclusive"


def test_contradiction_by_one_of_two_controls_is_corrected_by_holm():
    # One-sided p of (-0.62, -0.3, -0.2, -0.2): t = -0.33 / 0.0999 = -3.30, df 3, p = 0.0229: enough alone, not of two.
    near = (-0.62, -0.3, -0.2, -0.2)
    assert verdict(runs(a=near), arms("a")).word == "contradicted"
    assert verdict(runs(a=near, b=OPEN), arms("a", "b")).word == "inconclusive"


def test_no_effect_when_the_90_percent_interval_lies_inside_the_margin():
    assert verdict(runs(old=NOTHING)).word == "no effect"


def test_equivalence_with_one_of_two_controls_is_corrected_by_holm():
    # TOST p against the margin: t = (0.1 - 0) / (0.08165 / 2) = 2.449, df 3, p = 0.0459: enough alone, not of two.
    near = (-0.1, 0.0, 0.0, 0.1)
    assert verdict(runs(a=near), arms("a")).word == "no effect"
    assert verdict(runs(a=near, b=OPEN), arms("a", "b")).word == "inconclusive"


def test_inconclusive_names_the_control_and_how_many_seeds_would_decide():
    result = verdict(runs(a=CLEAR, b=OPEN), arms("a", "b"))
    assert "b: the interval includes 0" in result.reason
    assert "a:" not in result.reason
    # 0.15 > t(n-1) * 0.2517 / sqrt(n) first at n = 14: t(13) = 2.1604 gives 0.1453; n = 13 gives 0.1521.
    assert result.more_seeds == 10
    assert result.advice.startswith("Run 10 more seeds (about 30 min)")


def test_lower_is_better_turns_the_sign_around():
    of = claim(endpoint=Endpoint("loss", better="lower", margin=0.1))
    result = verdict(runs(metric="loss", sign=-1.0, old=CLEAR), of=of)
    assert result.word == "supported"
    assert result.effects[0].effect == pytest.approx(0.3)
    assert result.effects[0].treatment_mean < result.effects[0].control_mean
    assert "lowers loss by 0.30" in result.sentence


@pytest.mark.parametrize(
    ("second", "word"), [(CLEAR, "supported"), (SLIGHT, "small"), (OPEN, "inconclusive"), (WORSE, "contradicted")]
)
def test_all_co_primary_endpoints_must_hold(second, word):
    records = and_metric(runs(old=CLEAR), "speed", old=second)
    result = verdict(records, of=claim(co_primary=(SECOND,)))
    assert result.word == word
    assert result.co_primary[0].endpoint == "speed"


@pytest.mark.parametrize(
    ("guard", "word"),
    [
        (SLIGHTLY_WORSE, "supported"),
        (CLEAR, "supported"),
        (OPEN, "inconclusive"),
        (WORSE, "contradicted"),
        ((0.0,) * len(CLEAR), "supported"),
    ],
    ids=["slightly worse", "better", "open", "worse", "equal in every seed"],
)
def test_guards_must_stay_inside_their_margin(guard, word):
    records = and_metric(runs(old=CLEAR), "accuracy", old=guard)
    result = verdict(records, of=claim(guards=(GUARD,)))
    assert result.word == word
    if word == "contradicted":
        assert "guard" in result.reason
        assert "Do not use it: it costs more accuracy" in result.advice


def test_a_guard_that_is_equal_in_every_seed_asks_for_no_more_seeds():
    records = and_metric(runs(old=OPEN), "accuracy", old=(0.0,) * len(OPEN))
    result = verdict(records, of=claim(guards=(GUARD,)))
    assert result.word == "inconclusive"
    assert "guard" not in result.reason
    assert result.more_seeds == verdict(runs(old=OPEN)).more_seeds is not None


def test_secondary_endpoints_get_intervals_and_decide_nothing():
    records = and_metric(runs(old=CLEAR), "accuracy", old=WORSE)
    result = verdict(records, of=claim(secondary=(Endpoint("accuracy"),)))
    assert result.word == "supported"
    assert result.secondary[0].effect == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("quality", "treatment_bytes", "word"),
    [
        (SLIGHTLY_WORSE, 50.0, "supported"),
        (SLIGHTLY_WORSE, 60.0, "supported"),
        (SLIGHTLY_WORSE, 70.0, "small"),
        (SLIGHTLY_WORSE, 110.0, "no effect"),
        (OPEN, 110.0, "no effect"),
        (OPEN, 50.0, "inconclusive"),
        (WORSE_BELOW_MARGIN, 50.0, "inconclusive"),
        (WORSE, 50.0, "contradicted"),
        (WORSE, 110.0, "contradicted"),
        (CLEAR, 50.0, "supported"),
    ],
)
def test_non_inferiority_needs_quality_within_the_margin_and_the_saving(quality, treatment_bytes, word):
    records = and_cost(runs(old=quality), old=100.0, new=treatment_bytes)
    result = verdict(records, of=NON_INFERIOR)
    assert result.word == word
    assert result.savings[0].effect == pytest.approx(1 - treatment_bytes / 100)
    assert result.cost_ratio["bytes"] == pytest.approx(treatment_bytes / 100)


def test_a_saving_that_varies_is_judged_by_its_lower_bound():
    of = claim(kind="non-inferiority", saving=Saving("memory", least=0.4))
    base = and_metric(runs(old=SLIGHTLY_WORSE), "memory", old=(0, 0, 0, 0))
    records = [
        record if record.arm == "old" else _with(record, "memory", record.outcome.metrics["memory"] * share)
        for record, share in zip(base, (0.35, 0.5, 0.55, 0.6, 1, 1, 1, 1))
    ]
    # Savings 0.65, 0.5, 0.45, 0.4: mean 0.5, sd 0.108, standard error 0.054: 0.5 - 3.182 * 0.054 = 0.328 < 0.4.
    result = verdict(records, of=of)
    assert result.savings[0].low == pytest.approx(0.5 - 3.18245 * 0.0540062, abs=1e-5)
    assert result.word == "small"


@pytest.mark.parametrize(
    ("shares", "word"), [((1.0, 0.8, 1.1, 0.9), "no effect"), ((0.7, 0.5, 1.2, 0.9), "inconclusive")]
)
def test_a_saving_worth_having_is_ruled_out_by_its_90_percent_interval_alone(shares, word):
    # Savings 0, 0.2, -0.1, 0.1: mean 0.05, standard error 0.0645, upper bound at 95 % one-sided 0.05 + 2.353 * 0.0645 = 0.202.
    # Savings 0.3, 0.5, -0.2, 0.1: mean 0.175, standard error 0.149: 0.175 + 2.353 * 0.149 = 0.525, above the least, 0.4.
    of = claim(kind="non-inferiority", saving=Saving("memory", least=0.4))
    base = and_metric(runs(old=SLIGHTLY_WORSE), "memory", old=(0, 0, 0, 0))
    records = [
        record if record.arm == "old" else _with(record, "memory", record.outcome.metrics["memory"] * share)
        for record, share in zip(base, (*shares, 1, 1, 1, 1))
    ]
    result = verdict(records, of=of)
    assert result.word == word
    if word == "no effect":
        assert "saves too little against old: it saves 5 % of memory (90 % interval -10 to 20 %" in result.sentence
        assert "the saving lies below its least value against old" in result.reason
        assert result.advice.startswith("Do not use it to save memory: a saving worth having over old is ruled out")


def test_what_each_use_pays_stands_in_the_advice_beside_the_costs_of_the_run():
    of = claim(secondary=(Endpoint("flops_per_answer", better="lower"),), price="flops_per_answer")
    records = and_metric(runs(old=CLEAR), "flops_per_answer", old=(0, 0, 0, 0))
    records = [_with(record, "flops_per_answer", {"old": 200.0, "new": 362.0}[record.arm]) for record in records]
    result = verdict(records, of=of)
    assert result.cost_ratio["flops_per_answer"] == pytest.approx(1.81)
    assert result.advice.endswith("1.00 times the wall time and 1.81 times the flops per answer of old.")
    with pytest.raises(ValueError, match="one of the secondary endpoints"):
        claim(price="flops_per_answer")


def _with(record, name, value):
    from dataclasses import replace

    return replace(record, outcome=replace(record.outcome, metrics={**record.outcome.metrics, name: value}))


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_replicates_give_no_verdict_and_say_how_to_get_one(n):
    result = verdict(runs(old=CLEAR[:n]))
    assert result.word == "inconclusive"
    assert f"{n} training seed" in result.sentence or f"{n} seed" in result.sentence
    assert result.advice.startswith(f"Run {3 - n} more seed")
    assert result.more_seeds == 3 - n


def test_an_aa_trial_is_never_supported():
    result = verdict(runs(old=(0.0,) * 8))
    assert result.word == "inconclusive"
    assert result.effects[0].effect == 0.0
    assert (result.effects[0].low, result.effects[0].high) == (None, None)
    assert "exactly 0" in result.reason


def test_seeds_that_change_nothing_count_once():
    records = [r for seed in range(5) for r in _at_seed(runs(old=CLEAR[:1]), seed)]
    result = verdict(records)
    assert result.word == "inconclusive"
    assert result.effects[0].n == 1
    assert "bit for bit" in result.sentence
    assert "will not help" in result.advice


def _at_seed(records, seed):
    from dataclasses import replace

    return [replace(record, seed=seed) for record in records]


def test_a_metric_that_is_undefined_in_one_run_is_not_dropped():
    records = runs(old=CLEAR)
    records[1] = _undefined(records[1])
    result = verdict(records)
    assert result.word == "inconclusive"
    assert "the curve stops short" in result.reason
    assert result.effects[0].effect is None


def _undefined(record):
    from dataclasses import replace

    return replace(record, outcome=replace(record.outcome, metrics={}, undefined={"score": "the curve stops short"}))


def test_nan_without_a_word_about_divergence_is_undefined():
    records = runs(old=CLEAR)
    records[2] = _with(records[2], "score", float("nan"))
    assert "is nan" in verdict(records).reason


def test_log_scale_compares_ratios_and_says_so():
    of = claim(endpoint=Endpoint("perplexity", better="lower", margin=0.05, scale="log"))
    ratios = np.exp(CLEAR)
    records = [
        _with(r, "perplexity", 10.0 * (1 if r.arm == "new" else ratios[r.seed]) * (1 + r.seed)) for r in runs(old=CLEAR)
    ]
    result = verdict(records, of=of)
    assert result.effects[0].effect == pytest.approx(0.3)
    # exp(-0.3) = 0.741, so perplexity falls by 25.9 %; a margin of 0.05 is 4.88 %.
    assert "lowers perplexity by 26 %" in result.sentence
    assert "4.88 % (0.05 on the log scale)" in result.sentence


def test_an_effect_of_nothing_on_the_log_scale_is_said_in_percent_too():
    of = claim(endpoint=Endpoint("seconds", unit="s", better="lower", margin=0.2, scale="log"))
    gains = (0.08, -0.02, 0.05, 0.01)
    records = [_with(r, "seconds", np.exp(0.0 if r.arm == "new" else gains[r.seed])) for r in runs(old=CLEAR)]
    result = verdict(records, of=of)
    assert result.word == "no effect"
    # 1 - exp(-0.03) = 2.96 %, and 0.03 +- 2.353 * 0.044 / 2 is -0.022 to 0.082
    assert ": 3 % (90 % interval -2 % to 8 %; positive is better) against old" in result.sentence


def test_logit_scale_speaks_of_odds():
    of = claim(endpoint=Endpoint("accuracy", margin=0.2, scale="logit"))
    odds = {"new": (1.5, 2.0, 2.5, 3.0), "old": (1.0, 1.2, 1.5, 2.2)}
    records = [_with(r, "accuracy", odds[r.arm][r.seed] / (1 + odds[r.arm][r.seed])) for r in runs(old=CLEAR)]
    result = verdict(records, of=of)
    assert result.effects[0].effect == pytest.approx(np.mean(np.log(np.divide(odds["new"], odds["old"]))))
    assert "raises the odds of accuracy by a factor of" in result.sentence


def test_looking_early_widens_the_interval_and_is_named():
    at_once, looked = verdict(runs(old=CLEAR)), verdict(runs(old=CLEAR), look=Look((4, 8)))
    assert looked.effects[0].low < at_once.effects[0].low
    assert "repeated interval" in looked.sentence
    assert "looks at 4, 8 seeds" in looked.effects[0].method


def test_the_anytime_design_gives_no_verdict_at_three_seeds():
    # Against 0.3 +- 0.001 at three seeds, the interval of a fixed n would be far above 0.
    result = verdict(runs(old=(0.299, 0.3, 0.301)), look=Look(None))
    assert (result.word, result.effects[0].low) == ("inconclusive", None)
    assert "at least 4" in result.reason


def test_renaming_arms_and_permuting_seeds_changes_nothing():
    first = verdict(runs(old=CLEAR, other=OPEN), arms("old", "other"))
    order = [2, 0, 3, 1]
    moved = [_at_seed([record], order[record.seed])[0] for record in runs(old=CLEAR, other=OPEN)][::-1]
    second = verdict(moved, arms("old", "other"))
    assert (first.word, first.sentence, first.advice) == (second.word, second.sentence, second.advice)
    renamed = verdict(runs(x=CLEAR, y=OPEN), arms("x", "y"))
    assert renamed.word == first.word
    assert [e.low for e in renamed.effects] == [e.low for e in first.effects]


@pytest.mark.parametrize("differences", [CLEAR, SLIGHT, NOTHING, OPEN, WORSE, WORSE_BELOW_MARGIN])
@pytest.mark.parametrize("unit", [1000.0, 0.001])
def test_the_unit_of_the_endpoint_does_not_matter(differences, unit):
    scaled = [_with(record, "score", record.outcome.metrics["score"] * unit) for record in runs(old=differences)]
    assert verdict(scaled, margin=MARGIN * unit).word == verdict(runs(old=differences)).word


def test_a_replaced_endpoint_is_said_and_needs_a_margin():
    records = and_metric(runs(old=OPEN), "speed", old=CLEAR)
    result = verdict(records, endpoint=SECOND)
    assert result.word == "supported"
    assert "the claim's own endpoint score was replaced" in result.sentence
    with pytest.raises(ValueError, match="needs a margin"):
        verdict(records, endpoint=Endpoint("speed"))


def test_a_substitute_for_a_missing_metric_stands_in_the_sentence_and_among_the_threats():
    note = "score is measured without gold, by agreement with the teacher."
    result = verdict(runs(old=CLEAR), substitutes=(note, "labels were shuffled"))
    assert "by agreement with the teacher" in result.sentence
    assert {note, "labels were shuffled"} <= set(result.threats)


def test_the_correlation_between_the_arms_is_reported():
    records = runs(old=CLEAR)
    new = [r.outcome.metrics["score"] for r in records if r.arm == "new"]
    old = [r.outcome.metrics["score"] for r in records if r.arm == "old"]
    assert verdict(records).effects[0].correlation == pytest.approx(np.corrcoef(new, old)[0, 1])


def test_sentence_has_direction_amount_interval_margin_and_what_it_generalises_over():
    result = verdict(runs(old=CLEAR))
    assert result.sentence == (
        "new raises score by 0.30 points (95 % interval 0.17 to 0.43) against old, at least the margin of 0.1 points; "
        "over 4 training seeds."
    )
    assert result.advice.startswith("Use it: the gain in score is worth having")
    assert SCORE.unit == "points"
