from __future__ import annotations

import dataclasses
import json

import pytest

from tests.trials.conftest import arm_of
from trialist.trials._thinking import Trace, until
from trialist.trials._thinking_arms import elected, enough
from trialist.trials.budget_forcing import BudgetForcingTrial

SMALL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "fewest": 3,
    "most": 4,
    "batch": 8,
    "steps": 4,
    "think_tokens": 40,
    "test_items": 6,
}


@pytest.fixture
def trial():
    return BudgetForcingTrial(**SMALL)


def trace(answer: str | None, tokens: int = 5) -> Trace:
    return Trace(f"#{answer}", answer, answer == "1", tokens - 2, tokens)


def test_no_control_gets_fewer_tokens_than_the_treatment_and_items_are_the_same(trial, run_arm):
    outcomes = {
        arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "wait" and arm.name != "natural"
    }
    treatment = outcomes["budget-forcing"]
    for name, outcome in outcomes.items():
        items = outcome.items["accuracy_at_equal_tokens"]
        assert items.ids == treatment.items["accuracy_at_equal_tokens"].ids
        assert outcome.metrics["accuracy_at_equal_tokens"] == pytest.approx(sum(items.scores) / len(items.scores))
        assert set(outcome.metrics) == {
            "accuracy_at_equal_tokens",
            "gain_over_natural",
            "thinking_tokens",
            "repetition",
        }
        if name != "shorter":
            assert outcome.cost.generated_tokens >= treatment.cost.generated_tokens
    assert treatment.metrics["thinking_tokens"] >= 2 * outcomes["shorter"].metrics["thinking_tokens"] - 1


@pytest.mark.slow
def test_the_natural_traces_carry_the_curves(trial, run_arm):
    outcome = run_arm(trial, arm_of(trial, "natural", "wait"))
    assert outcome.metrics["gain_over_natural"] == 0
    assert {name for name in outcome.curves if name.endswith("_by_thinking_tokens")} == {
        f"accuracy_of_{name}_by_thinking_tokens" for name in ("maximum", "wait", "untrained_string")
    }
    assert any("maximum: control 100%" in note for note in outcome.notes)


def test_arms_share_the_model_and_its_traces(trial, run_arm, tmp_path):
    for name in ("majority-vote", "rejection-sampling", "budget-forcing"):
        run_arm(trial, arm_of(trial, name, "wait"))
    assert len(list((tmp_path / "stages").glob("thinker-*"))) == 1
    assert len(list((tmp_path / "stages").glob("sampled-*"))) == 1
    assert len(list((tmp_path / "stages").glob("forced-*"))) == 3  # natural, one end put off, two


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path):
    import shutil

    arm = arm_of(trial, "token-conditional", "wait")
    first = run_arm(trial, arm)
    shutil.rmtree(tmp_path / "stages")
    again = run_arm(trial, arm)
    assert (again.metrics, again.items, again.cost) == (first.metrics, first.items, first.cost)


def test_the_null_setting_is_the_same_with_a_string_that_no_trace_has(trial):
    null = {arm.name for arm in trial.arms() if arm.null}
    assert null == {arm.name for arm in trial.arms() if not arm.null and arm.role != "reference"}
    thinker = trial.thinker()
    assert thinker.string(wait=True) != thinker.string(wait=False)


def test_the_numbers_of_ignored_ends_double_up_to_the_most(trial):
    assert trial.ignores == (1, 2)
    assert dataclasses.replace(trial, num_ignore=5).ignores == (1, 2, 4)


def test_samples_are_drawn_until_they_have_the_tokens_and_the_first_ones_count():
    asked = []

    def draw(short, number):
        asked.append((list(short), number))
        return [trace("1", 4 + index) for index in short]

    found = until([9, 4], [trace("0", 5), trace("0", 5)], draw)
    assert asked == [([0], 0)]
    assert [len(part) for part in found] == [2, 1]
    samples = [[trace("0", 4), trace("1", 4), trace("1", 4)]]
    assert [len(part) for part in enough(samples, [trace("1", 8)])] == [2]
    with pytest.raises(ValueError, match="do not reach the tokens"):
        until([99], [], lambda short, number: [trace("1", 1)])


def test_the_majority_is_that_of_answers_and_the_first_decides_ties():
    assert elected([trace("2"), trace("1"), trace("1")]).answer == "1"
    assert elected([trace("2"), trace("1")]).answer == "2"
    assert elected([trace(None, 3), trace(None, 4)]).tokens == 3


def test_a_given_model_answers_worded_problems_through_the_same_path(llama_folder, run_arm, tmp_path):
    data = tmp_path / "own.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is #### {2 * n}"} for n in range(131)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trial = BudgetForcingTrial(
        model=llama_folder, data=str(data), test_items=3, think_tokens=12, answer_tokens=3, num_ignore=1
    )
    assert trial.replicates_over() == "item"
    with pytest.raises(ValueError, match="lower --test-items"):
        dataclasses.replace(trial, test_items=4).check()
    trial.check()
    # 64 positions do not hold the instruction; a model with more is asked
    import transformers

    folder = tmp_path / "longer"
    config = transformers.AutoConfig.from_pretrained(llama_folder, max_position_embeddings=512)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
    trial = dataclasses.replace(trial, model=str(folder))
    for name in ("budget-forcing", "rejection-sampling", "token-conditional"):
        outcome = run_arm(trial, arm_of(trial, name, "wait"))
        assert len(outcome.items["accuracy_at_equal_tokens"].ids) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_ignore": 0}, "--num-ignore must be at least 1"),
        ({"think_tokens": 20}, "--think-tokens 20: a trace and its re-computation have up to 30"),
        ({"most": 1}, "fewest=3 and most=1"),
        ({"width": 15}, "multiple of --heads"),
        ({"fewest": 2, "modulus": 3}, "there are 9 such sums below 3"),
    ],
)
def test_inputs_that_cannot_work_are_refused_before_anything_runs(trial, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **changes).check()
