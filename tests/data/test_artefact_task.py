from __future__ import annotations

import collections
import itertools

import pytest

from trialist.data.artefact_task import END, PHRASE, SIDES, STATEMENTS, WANTED, ArtefactTask


def taken(items, count=400):
    return list(itertools.islice(items, count))


def statements(task, answer, side):
    """How many statements of an answer are on a side, counted from its tokens."""
    return sum(token in task.sides[SIDES.index(side)] for token in answer.tokens)


def test_the_two_parts_of_quality_are_what_an_answer_names_and_which_side_it_takes():
    task = ArtefactTask()
    for prompt, answers in taken(task.candidates(1, 5), 80):
        side, *wanted = prompt[1:-1]
        other = SIDES[1 - SIDES.index(side)]
        for answer in answers:
            assert len(set(answer.tokens) & set(wanted)) == answer.relevance
            assert statements(task, answer, side) == answer.correctness == STATEMENTS - statements(task, answer, other)
            assert (answer.tokens[: len(PHRASE)] == PHRASE) is answer.phrase
            length = len(PHRASE) * answer.phrase + WANTED + STATEMENTS + task.short + task.extra * answer.long + 1
            assert len(answer.tokens) == length <= task.longest - len(prompt)
            assert answer.tokens[-1] == END
            assert max(answer.tokens) < task.vocabulary


def test_the_better_answer_has_more_quality_and_at_equal_quality_more_correctness():
    for pair in taken(ArtefactTask(noise=0.0).pairs(3)):
        better, worse = pair.chosen, pair.rejected
        assert (better.quality, better.correctness) > (worse.quality, worse.correctness)
        assert not pair.mislabelled


def test_artefacts_follow_the_winner_at_their_rates_and_labels_are_wrong_as_often_as_said():
    pairs = taken(ArtefactTask(0.8, 0.3, noise=0.2).pairs(3), 4000)
    for name, rate in (("chosen", 0.8), ("rejected", 0.3)):
        for mark in ("phrase", "long"):
            assert sum(getattr(getattr(pair, name), mark) for pair in pairs) / 4000 == pytest.approx(rate, abs=0.03)
    wrong = [pair.chosen.quality < pair.rejected.quality for pair in pairs]
    assert sum(pair.mislabelled for pair in pairs) / 4000 == pytest.approx(0.2, abs=0.03)
    assert all(pair.mislabelled for pair, is_wrong in zip(pairs, wrong) if is_wrong)


def test_an_answer_to_another_prompt_is_as_often_correct_as_one_to_this_prompt_whatever_its_relevance():
    task = ArtefactTask()
    pairs = taken(task.pairs(4), 6000)
    own, given = collections.Counter(), collections.Counter()
    for pair, donor in itertools.pairwise(pairs):
        for answer, donated in zip((pair.chosen, pair.rejected), (donor.chosen, donor.rejected)):
            own[answer.relevance, answer.correctness] += 1
            given[statements(task, donated, pair.prompt[1])] += 1
    for correctness in range(STATEMENTS + 1):
        assert given[correctness] / given.total() == pytest.approx(1 / 4, abs=0.02)
        for relevance in range(1, WANTED + 1):
            assert own[relevance, correctness] / own.total() == pytest.approx(1 / 16, abs=0.01)


def test_answers_to_other_prompts_name_what_is_wanted_by_chance_only():
    task = ArtefactTask()
    pairs = taken(task.pairs(4), 2000)
    by_chance = [len(set(a.prompt[2:-1]) & set(b.chosen.tokens)) for a, b in itertools.pairwise(pairs)]
    assert sum(by_chance) / len(by_chance) == pytest.approx(1 / task.topics + 9 / task.keywords, abs=0.07)
    for pair in taken(task.off_topic(2), 200):
        wanted = set(pair.prompt[2:-1])
        assert not wanted & set(pair.rejected.tokens)
        assert len(wanted & set(pair.chosen.tokens)) >= WANTED // 2
        sides = [statements(task, answer, pair.prompt[1]) for answer in (pair.chosen, pair.rejected)]
        assert sides[0] == sides[1]
        assert (pair.chosen.phrase, pair.chosen.long, pair.rejected.phrase, pair.rejected.long) == (
            False,
            False,
            True,
            True,
        )


@pytest.mark.parametrize(("part", "other"), [("correctness", "relevance"), ("relevance", "correctness")])
def test_a_contrast_differs_in_one_part_and_is_the_same_whichever_answer_has_the_artefact(part, other):
    task = ArtefactTask()
    made = [
        taken(task.contrasts(5, part, phrase=phrase, long=long), 100)
        for phrase, long in (
            ((False, True), (False, False)),
            ((True, False), (False, False)),
            ((False,) * 2, (True, False)),
        )
    ]
    for in_worse, in_better, in_length in zip(*made):
        assert getattr(in_worse.chosen, part) > getattr(in_worse.rejected, part)
        assert getattr(in_worse.chosen, other) == getattr(in_worse.rejected, other)
        assert (in_worse.chosen.phrase, in_worse.rejected.phrase) == (False, True)
        assert (in_better.chosen.phrase, in_better.rejected.phrase) == (True, False)
        assert (in_length.chosen.long, in_length.rejected.long) == (True, False)
        assert len({pair.prompt for pair in (in_worse, in_better, in_length)}) == 1
        for name in ("relevance", "correctness"):
            sizes = {(getattr(p.chosen, name), getattr(p.rejected, name)) for p in (in_worse, in_better, in_length)}
            assert len(sizes) == 1


def test_the_topic_can_be_in_every_answer_to_a_prompt():
    task = ArtefactTask(names_topic=True)
    answers = [(pair.prompt, answer) for pair in taken(task.pairs(1)) for answer in (pair.chosen, pair.rejected)]
    answers += [(prompt, answer) for prompt, some in taken(task.candidates(2, 5), 50) for answer in some]
    for prompt, answer in answers:
        assert prompt[2] in answer.tokens
        assert len(set(answer.tokens) & set(prompt[2:-1])) == answer.relevance
