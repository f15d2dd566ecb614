from __future__ import annotations

import numpy as np
import pytest
import torch

from trialist.data.fact_world import (
    ANSWER,
    BOS,
    END,
    IS,
    OF,
    QUESTION,
    STOP,
    FactWorld,
    QuestionBatches,
    StatementBatches,
)

WORLD = FactWorld(3, old=9, new=7, relations=2, values=5, names=6)


def fact_table() -> dict[tuple[int, int, int], int]:
    """(first, last, relation) -> value, by tokens."""
    relation = 7 + 2 * WORLD.names
    return {
        (*map(int, WORLD.entities[entity]), relation + r): int(WORLD.facts[entity, r])
        for entity in range(16)
        for r in range(2)
    }


def test_entities_are_distinct_and_names_values_and_form_have_tokens_of_their_own():
    assert len({tuple(pair) for pair in WORLD.entities.tolist()}) == 16
    firsts, lasts = WORLD.entities.T
    assert 7 <= firsts.min() <= firsts.max() < 13 <= lasts.min() <= lasts.max() < 19
    assert 21 <= WORLD.facts.min() <= WORLD.facts.max() < WORLD.size == 26


def test_the_parts_asked_about_share_no_entity():
    parts = [
        set(WORLD.part(name).tolist())
        for name in ("taught", "old-validation", "old-test", "new-validation", "new-test")
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 16
    assert set.union(*parts[:3]) == set(WORLD.part("old").tolist())
    assert set.union(*parts[3:]) == set(WORLD.part("new").tolist())


def test_every_statement_says_what_is_true_of_an_entity_of_its_part():
    table = fact_table()
    old = {tuple(WORLD.entities[entity]) for entity in WORLD.part("old")}
    seen = set()
    for row in WORLD.statements(40, 61, ("old",), np.random.default_rng(0)).tolist():
        assert row[0] == BOS
        place = 1
        while place + 7 <= len(row):
            if row[place + 1] == OF:
                relation, of, first, last, means, value, stop = row[place : place + 7]
                assert (of, means, stop) == (OF, IS, STOP)
                place += 7
            else:
                first, last, relation, value, stop = row[place : place + 5]
                assert stop == STOP
                place += 5
            assert table[first, last, relation] == value
            assert (first, last) in old
            seen.add((first, last, relation))
    assert len(seen) == 18  # all facts of the old part


def test_two_parts_come_about_as_often_whatever_their_sizes():
    world = FactWorld(0, old=20, new=4, names=6)
    rows = world.statements(200, 60, ("old", "new"), np.random.default_rng(1))
    new = {tuple(world.entities[entity]) for entity in world.part("new")}
    pairs = [(row[i], row[i + 1]) for row in rows.tolist() for i in range(59) if 7 <= row[i] < 13 <= row[i + 1] < 19]
    share = sum(pair in new for pair in pairs) / len(pairs)
    assert share == pytest.approx(0.5, abs=0.05)


def test_a_question_asks_for_one_true_value_and_only_the_answer_counts():
    table = fact_table()
    questions = WORLD.questions("new-test")
    assert questions["input_ids"].shape == (2 * 4, 8)
    for ids, labels in zip(questions["input_ids"].tolist(), questions["labels"].tolist()):
        bos, question, relation, first, last, answer, value, end = ids
        assert (bos, question, answer, end) == (BOS, QUESTION, ANSWER, END)
        assert table[first, last, relation] == value
        assert labels == [-100] * 6 + [value, END]


def test_batches_depend_on_seed_and_step_alone():
    for make in (
        lambda seed: StatementBatches(WORLD, ("old", "new"), 3, 17, seed),
        lambda seed: QuestionBatches(WORLD, "taught", 5, seed),
    ):
        first, again, other = make(1), make(1), make(2)
        again(7)
        assert torch.equal(first(4)["input_ids"], again(4)["input_ids"])
        assert not torch.equal(first(4)["input_ids"], first(5)["input_ids"])
        assert not torch.equal(first(4)["input_ids"], other(4)["input_ids"])


def test_more_entities_than_names_are_refused():
    with pytest.raises(ValueError, match="make 36 entities, fewer than the 40 wanted"):
        FactWorld(0, old=20, new=20, names=6)
    with pytest.raises(ValueError, match="at least 2 old"):
        FactWorld(0, old=1)
