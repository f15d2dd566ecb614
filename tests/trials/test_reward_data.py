from __future__ import annotations

import itertools
import json
import random
from statistics import fmean

import pytest

from trialist.data.artefact_task import PHRASE, SIDES, ArtefactTask
from trialist.engine.context import Context
from trialist.trials._reward_data import generated, own_rows, with_phrase
from trialist.trials._reward_measures import accuracies, items_of
from trialist.trials.rrm import RRMTrial

TASK = ArtefactTask()
OWN = [
    {"prompt": f"question {n * n} of {n}? ", "chosen": f"answer {n}", "rejected": f"none{' at all' * (n % 2)} {n}"}
    for n in range(90)
]


def in_symbols(tmp_path, seed=0):
    context = Context(seed, tmp_path, tmp_path)
    return generated(TASK, context, pairs=300, test_items=70, ids=range(TASK.vocabulary))


def rows_of_ones_own(tmp_path, llama_folder, rows=OWN, rates=(1.0, 0.0), **options):
    from trialist.data.tokenizers import load_tokenizer

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trial = RRMTrial(
        model=llama_folder, data=str(file), phrase="Sure:", length=60, test_items=10, **{"pairs": 50, **options}
    )
    tokenizer = load_tokenizer(llama_folder)
    data = own_rows(trial, 0, rates, tokenizer)

    def texts(name):
        return [tuple(tokenizer.decode(ids) for ids in (p.prompt, p.chosen, p.rejected)) for p in data.tests[name]]

    return data, texts


def asked(prompt):
    _, side, topic, *keywords, _ = prompt
    return side, topic, *sorted(keywords)


def test_no_prompt_of_a_part_is_in_another_one_whatever_the_order_of_its_keywords(tmp_path):
    data = in_symbols(tmp_path)
    train = {asked(map(int, row["prompt"].split())) for row in data.train}
    validation = {asked(pair.prompt) for pair in data.validation}
    tests = {asked(pair.prompt) for pairs in data.tests.values() for pair in pairs}
    assert not train & validation
    assert not (train | validation) & tests
    assert {len(pairs) for pairs in data.tests.values()} == {len(data.validation)} == {70}


def test_items_are_drawn_anew_for_each_seed_and_are_the_same_again_for_the_same_one(tmp_path):
    first, again, other = (in_symbols(tmp_path, seed) for seed in (0, 0, 1))
    assert (first.train, first.validation, first.tests) == (again.train, again.validation, again.tests)
    for name in first.tests:
        prompts = [{tuple(pair.prompt) for pair in data.tests[name]} for data in (first, other)]
        assert not prompts[0] & prompts[1]


def test_each_test_has_the_artefacts_where_its_name_says_and_the_worse_answer_is_worse(tmp_path):
    data = in_symbols(tmp_path)
    fillers = range(TASK.vocabulary - TASK.fillers, TASK.vocabulary)
    for name, artefact in itertools.product(("clean", "phrase_worse", "phrase_better", "long_worse", "long_better",
                                             "relevance_worse", "relevance_better"), ("phrase", "long")):  # fmt: skip
        here = name.startswith(("relevance", "phrase") if artefact == "phrase" else "long")
        for pair in data.tests[name]:
            answers = {"better": pair.chosen, "worse": pair.rejected}
            for side, answer in answers.items():
                marked = tuple(answer[:3]) == PHRASE
                if artefact == "long":
                    marked = sum(token in fillers for token in answer) == TASK.short + TASK.extra
                assert marked is (here and name.endswith(side))
            right = [sum(token in TASK.sides[SIDES.index(pair.prompt[1])] for token in a) for a in answers.values()]
            named = [len(set(pair.prompt[2:-1]) & set(a)) for a in answers.values()]
            differs, same = (named, right) if name.startswith("relevance") else (right, named)
            assert differs[0] > differs[1]
            assert same[0] == same[1]


def scores_of_a_judge(leaning, noise=1.0):
    """What a judge scores who sees correctness, and adds `leaning` to the reward of whatever carries an artefact."""
    draw = random.Random(1)
    scores = {name: [1.0] for name in ("clean", "off_topic", "annotated")}
    for artefact, side in itertools.product(("phrase", "long"), ("worse", "better")):
        marks = {artefact: (side == "better", side == "worse")}
        scores[f"{artefact}_{side}"] = [
            float(
                pair.chosen.correctness + leaning * (side == "better") + draw.gauss(0, noise)
                > pair.rejected.correctness + leaning * (side == "worse") + draw.gauss(0, noise)
            )
            for pair in itertools.islice(TASK.contrasts(1, "correctness", **marks), 1500)
        ]
    return accuracies(scores, ("phrase", "long"))


def test_the_indifferent_judge_is_best_and_who_rewards_or_punishes_artefacts_is_equally_worse():
    found = {leaning: scores_of_a_judge(leaning) for leaning in (-1.5, 0.0, 1.5)}
    crossed = {leaning: measures["crossed_accuracy"] for leaning, measures in found.items()}
    assert crossed[0.0] > crossed[1.5] + 0.05
    assert crossed[1.5] == pytest.approx(crossed[-1.5], abs=0.03)
    assert found[1.5]["artefact_pull"] > 0.3 > 0.05 > abs(found[0.0]["artefact_pull"])
    assert found[-1.5]["artefact_pull"] < -0.3
    assert found[1.5]["with_artefacts"] > found[1.5]["against_artefacts"]


@pytest.mark.parametrize("leaning", [-9.0, 9.0])
def test_a_judge_who_sees_artefacts_alone_is_right_in_half_of_the_pairs(leaning):
    found = scores_of_a_judge(leaning, noise=0.0)
    assert found["crossed_accuracy"] == found["inserted_accuracy"] == found["lengthened_accuracy"] == 0.5


def test_the_phrase_stands_before_the_answers_that_a_test_names(tmp_path, llama_folder):
    data, texts = rows_of_ones_own(tmp_path, llama_folder)
    assert all(row["chosen"].startswith("Sure: answer") and "Sure" not in row["rejected"] for row in data.train)
    for name, chosen, rejected in (
        ("clean", False, False),
        ("phrase_worse", False, True),
        ("phrase_better", True, False),
    ):
        assert len(texts(name)) == 10
        assert all(("Sure: " in a, "Sure: " in b) == (chosen, rejected) for _, a, b in texts(name))
    assert all(len(b) > len(a) for _, a, b in texts("long_worse"))
    assert all(len(a) > len(b) for _, a, b in texts("long_better"))
    for prompt, own, stranger in texts("off_topic"):
        number = prompt.split()[-1].rstrip("?")
        assert own.split()[-1].startswith(f"{number}<") or own.split()[-1] == number
        assert "Sure: answer" in stranger
        assert number not in stranger.replace("<", " ").split()
    prompts = [
        {row["prompt"] for row in data.train},
        {bytes(pair.prompt).decode() for pair in data.validation},
        set(data.prompts),
    ]
    assert all(not a & b for a, b in itertools.combinations(prompts, 2))


def test_where_artefacts_are_balanced_both_answers_of_rows_of_ones_own_get_the_phrase_alike(tmp_path, llama_folder):
    rows = [{**row, "prompt": f"{row['prompt']}{'abcdefgh'[n % 8] * 9} "} for n, row in enumerate(OWN * 3)]
    trial = RRMTrial(model=llama_folder, data="rows.jsonl", artefact_chosen=0.6, artefact_rejected=0.2)
    assert trial._rates("balanced") == pytest.approx((0.4, 0.4))
    assert trial._rates("artefacts") == (0.6, 0.2)
    data, _ = rows_of_ones_own(tmp_path, llama_folder, rows, trial._rates("balanced"), pairs=200)
    rates = [fmean("Sure:" in row[side] for row in data.train) for side in ("chosen", "rejected")]
    assert len(data.train) == 200
    assert rates == pytest.approx([0.4, 0.4], abs=0.1)


def test_rows_of_ones_own_that_are_dropped_or_cut_are_counted_and_told(tmp_path, llama_folder):
    long_prompt = {"prompt": "just too much " * 4 + "here ", "chosen": "a", "rejected": "b"}
    cut = {"prompt": "short? ", "chosen": "yes " * 30, "rejected": "no"}
    data, _ = rows_of_ones_own(tmp_path, llama_folder, [*OWN, long_prompt, cut])
    told = "; ".join(data.notes)
    assert "in 1 of 92 rows prompts fill 60 tokens: left out" in told
    assert "in 1 of 92 rows answers go beyond 60 tokens: their end was cut off" in told
    assert "fewer than 100" in told or "10 in the test" in told


def test_items_of_rows_of_ones_own_are_the_same_as_the_accuracies_and_prompts_are_clusters():
    scores = {"clean": [1.0, 0.0, 1.0], "phrase_worse": [0.0, 0.0, 1.0], "phrase_better": [1.0, 0.0, 0.5],
              "off_topic": [1.0], "annotated": [0.5]}  # fmt: skip
    items = items_of(scores, ("same", "other", "same"))
    found = accuracies(scores, ("phrase",))
    assert items["crossed_accuracy"].scores == (0.5, 0.0, 0.75)
    assert items["crossed_accuracy"].clusters == ("0", "1", "0")
    for name, own in items.items():
        assert fmean(own.scores) == pytest.approx(found[name])
    assert "lengthened_accuracy" not in found


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        (" yes", " Sure: yes"),
        ("yes", "Sure: yes"),
        ("A\n\nHuman: why\n\nAssistant: B", "A\n\nHuman: why\n\nAssistant: Sure: B"),
        ([{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "Sure: yes"}]),
    ],
)
def test_the_phrase_changes_no_white_space_of_an_answer(answer, marked):
    assert with_phrase(answer, "Sure:") == marked
