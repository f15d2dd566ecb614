from __future__ import annotations

import collections
import dataclasses
import itertools
import json

import pytest

from tests.trials.conftest import arm_of
from trialist.data.artefact_task import END, FIRST_TOPIC, PHRASE, ArtefactTask
from trialist.trials._reward_arms import GroupBatches
from trialist.trials.rrm import RRMTrial

SMALL = {"layers": 1, "width": 16, "pairs": 40, "forwards": 480, "batch": 24, "test_items": 20,
         "learning_rate": 3e-4}  # fmt: skip


@pytest.fixture
def trial():
    return RRMTrial(**SMALL)


def test_every_arm_spends_the_same_sequence_forwards_what_filtering_takes_included(trial, run_arm):
    trial.check()
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "artefacts"}
    names = {endpoint.name for endpoint in trial.claim.endpoints} | {"validation_accuracy"}
    for outcome in outcomes.values():
        assert set(outcome.metrics) == names
        assert 480 - 2 * 24 < outcome.cost.sequence_forwards <= 480
    assert outcomes["plain"].cost.sequence_forwards == 480
    steps = {name: outcome.cost.steps for name, outcome in outcomes.items()}
    assert steps["plain"] == steps["unfiltered"] == 20 > steps["filter-only"] > steps["rrm"]
    assert "the filter kept" in outcomes["rrm"].notes[0]


def test_a_run_is_a_pure_function_of_its_seed_and_arms_begin_alike(trial, run_arm):
    first, again, other = (run_arm(trial, arm_of(trial, "rrm", "balanced"), seed) for seed in (0, 0, 1))
    assert first.metrics == again.metrics
    assert first.curves != other.curves


def test_a_batch_holds_whole_groups_and_the_plan_ends_before_the_budget_does():
    groups = [{"sequences": [[1]] * count} for count in (2, 6, 3, 4, 2, 5, 6)]
    batches = GroupBatches(groups, 10, 100, 0)
    plan = batches.plan()
    sizes = [sum(len(groups[index]["sequences"]) for index in batch) for batch in plan]
    assert max(sizes) <= 10
    assert 90 < sum(sizes) == batches.spent(plan) <= 100
    used = collections.Counter(index for batch in plan for index in batch)
    assert max(used.values()) - min(used[index] for index in range(7)) <= 1  # epoch after epoch
    with pytest.raises(ValueError, match="a prompt has 6"):
        GroupBatches(groups, 5, 100, 0).plan()


def test_an_arm_whose_filter_diverges_has_diverged(trial, run_arm):
    outcome = run_arm(trial, arm_of(trial, "rrm", "artefacts").with_options(learning_rate=30.0))
    assert outcome.diverged.startswith("the model to filter by: ")
    assert 0 < outcome.cost.sequence_forwards <= 80


def taken(items, count=400):
    return list(itertools.islice(items, count))


def test_the_quality_of_an_answer_is_the_number_of_wanted_keywords_in_it():
    task = ArtefactTask()
    for pair in taken(task.contrasts(1, phrase=(False, True), long=(True, False))):
        for answer, phrase, long in ((pair.chosen, False, True), (pair.rejected, True, False)):
            assert len(set(answer.tokens) & set(pair.prompt[1:-1])) == answer.quality
            assert (answer.tokens[: len(PHRASE)] == PHRASE) is phrase
            assert len(answer.tokens) == len(PHRASE) * phrase + 4 + task.short + task.extra * long + 1
            assert sum(token in range(FIRST_TOPIC, FIRST_TOPIC + task.topics) for token in answer.tokens) == 1
            assert answer.tokens[-1] == END
            assert max(answer.tokens) < task.vocabulary
        assert pair.chosen.quality > pair.rejected.quality > 0


def test_the_topic_can_be_in_every_answer_to_a_prompt():
    task = ArtefactTask(names_topic=True)
    answers = [(pair.prompt, answer) for pair in taken(task.pairs(1)) for answer in (pair.chosen, pair.rejected)]
    answers += [(prompt, answer) for prompt, some in taken(task.candidates(2, 5), 50) for answer in some]
    for prompt, answer in answers:
        assert prompt[1] in answer.tokens
        assert len(set(answer.tokens) & set(prompt[1:-1])) == answer.quality


def test_artefacts_follow_the_winner_at_their_rates_and_labels_are_wrong_as_often_as_said():
    pairs = taken(ArtefactTask(0.8, 0.3, noise=0.2).pairs(3), 4000)
    for name, rate in (("chosen", 0.8), ("rejected", 0.3)):
        for mark in ("phrase", "long"):
            assert sum(getattr(getattr(pair, name), mark) for pair in pairs) / 4000 == pytest.approx(rate, abs=0.03)
    assert sum(pair.chosen.quality < pair.rejected.quality for pair in pairs) / 4000 == pytest.approx(0.2, abs=0.03)


def test_answers_to_another_prompt_name_nothing_that_is_wanted_in_the_test_and_little_elsewhere():
    task = ArtefactTask()
    for pair in taken(task.off_topic(2), 200):
        wanted = set(pair.prompt[1:-1])
        assert not wanted & set(pair.rejected.tokens)
        assert len(wanted & set(pair.chosen.tokens)) == pair.chosen.quality > 0
    pairs = taken(task.pairs(4), 2000)
    by_chance = [len(set(a.prompt[1:-1]) & set(b.chosen.tokens)) for a, b in itertools.pairwise(pairs)]
    assert sum(by_chance) / len(by_chance) == pytest.approx(1 / task.topics + 9 / task.keywords, abs=0.07)


ROWS = [
    {"prompt": f"question {n * n} of {n}? ", "chosen": f"answer {n}", "rejected": f"none{' at all' * (n % 2)} {n}"}
    for n in range(90)
]


def test_a_given_model_and_rows_of_ones_own_go_through_the_same_path(llama_folder, run_arm, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = {**SMALL, "forwards": 400, "length": 64}
    trial = RRMTrial(model=llama_folder, data=str(rows), phrase="Sure:", lora=2, **sizes)
    trial.check()
    outcome = run_arm(trial, arm_of(trial, "rrm", "artefacts"), keep_model=True)
    assert set(outcome.undefined) == {"best_of_16_quality", "best_of_16_artefacts"}
    assert {endpoint.name for endpoint in trial.claim.endpoints} == set(outcome.metrics) - {
        "validation_accuracy"
    } | set(outcome.undefined)
    assert trial.remarks()
    other = RRMTrial(model=llama_folder, **SMALL)  # symbols, spread over its vocabulary
    other.check()
    assert run_arm(other, arm_of(other, "plain", "balanced")).cost.sequence_forwards == 480
    from transformers import AutoModelForSequenceClassification

    kept = next(tmp_path.glob("artefacts-rrm-*/model"))
    assert AutoModelForSequenceClassification.from_pretrained(kept).config.num_labels == 1


def test_the_phrase_stands_before_the_last_answer_and_only_where_it_should(tmp_path):
    from trialist.data.preferences import PreferencePair
    from trialist.trials._reward_data import own_rows

    def encode(rows):
        return [PreferencePair([1], [2], [3], n) for n in range(len(rows))]

    data = own_rows(ROWS, 0, phrase="Sure:", rates=(1.0, 0.0), pairs=50, test_items=10, encode=encode)
    assert all(row["chosen"].startswith(" Sure: answer") and "Sure" not in row["rejected"] for row in data.train)
    assert all("Sure" not in row["chosen"] and "Sure:" in row["rejected"] for row in data.tests["inserted_accuracy"])
    assert not any("Sure" in row["chosen"] + row["rejected"] for row in data.tests["clean_accuracy"])
    assert all(len(row["rejected"]) > len(row["chosen"]) for row in data.tests["lengthened_accuracy"])
    for row in data.tests["off_topic_accuracy"]:
        assert row["chosen"].split()[-1] == row["prompt"].split()[-1].rstrip("?")
        assert row["chosen"].split()[-1] != row["rejected"].split()[-1]
    prompts = [{row["prompt"] for row in part} for part in (data.train, data.validation, data.tests["clean_accuracy"])]
    assert all(not a & b for a, b in itertools.combinations(prompts, 2))
    turns = [
        {"prompt": "x", "chosen": f"A {n}\n\nHuman: why\n\nAssistant: B {n}", "rejected": f"C {n}" + " and so on" * 9}
        for n in range(60)
    ]
    turns = [{**row, "prompt": f"question {n * n * 7} number {n}"} for n, row in enumerate(turns)]
    marked = own_rows(turns, 0, phrase="Sure:", rates=(1.0, 0.0), pairs=5, test_items=5, encode=encode).train[0][
        "chosen"
    ]
    assert "\n\nAssistant: Sure: B" in marked
    assert marked.startswith("A ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 0}, "--pairs must be at least 1"),
        ({"forwards": 300}, "--forwards 300 is too few for --pairs 40"),
        ({"batch": 25}, "--batch must be even and at least 6"),
        ({"width": 18}, "--width 18 must be a multiple of 4"),
        ({"noise": 1.5}, "--noise must be from 0 to 1, not 1.5"),
        ({"sample_fraction": 0.0}, "--sample-fraction must be above 0"),
        ({"data": "rows.jsonl"}, "the built-in model reads symbols"),
        ({"lora": 4}, "--lora adapts a given model"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **change).check()
