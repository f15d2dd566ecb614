from __future__ import annotations

import numpy as np
import pytest
import torch

from trialist.data.recall import RecallBatches, RecallVocabulary, chance_answers, copying, variable_assignment

SMALL = RecallVocabulary(variables=3, values=5)


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("pairs", [1, 2, 11])
def test_the_answer_is_the_last_value_of_the_variable_asked_for(pairs: int):
    batch = variable_assignment(200, pairs, generator=draw(), vocabulary=SMALL)
    assert batch["input_ids"].shape == (200, 2 * pairs + 3)
    for row in batch["input_ids"].tolist():
        assert row[0] == SMALL.bos
        memory = {}
        for place in range(1, 2 * pairs + 1, 2):
            assert row[place] < 3
            assert 3 <= row[place + 1] < 8
            memory[row[place]] = row[place + 1]
        assert memory[row[-2]] == row[-1]


def test_only_the_answer_is_scored():
    batch = variable_assignment(6, 4, generator=draw(), vocabulary=SMALL)
    assert torch.all(batch["labels"][:, :-1] == -100)
    assert torch.equal(batch["labels"][:, -1], batch["input_ids"][:, -1])


def test_variables_that_occur_are_asked_for_equally_often():
    rows = variable_assignment(6_000, 12, generator=draw(), vocabulary=SMALL)["input_ids"]
    shares = torch.bincount(rows[:, -2], minlength=3) / 6_000  # nearly every row holds all three; s.e. 0.006
    assert torch.all((shares - 1 / 3).abs() < 0.03)


def test_a_copy_repeats_the_values_and_alone_is_scored():
    batch = copying(9, 4, generator=draw(), vocabulary=SMALL)
    ids = batch["input_ids"]
    assert ids.shape == (9, 10)
    assert torch.equal(ids[:, 1:5], ids[:, 6:])
    assert torch.all(ids[:, 5] == SMALL.separator)
    assert torch.all((ids[:, 1:5] >= 3) & (ids[:, 1:5] < 8))
    assert torch.all(batch["labels"][:, :6] == -100)
    assert torch.equal(batch["labels"][:, 6:], ids[:, 6:])


def test_answers_by_chance_tell_nothing_of_what_was_assigned():
    batch = chance_answers(6_000, 5, generator=draw(), vocabulary=SMALL)
    assert batch["input_ids"].shape == (6_000, 13)
    assert torch.all(batch["labels"][:, :-1] == -100)
    assert torch.equal(batch["labels"][:, -1], batch["input_ids"][:, -1])
    assigned = variable_assignment(6_000, 5, generator=draw(), vocabulary=SMALL)["input_ids"]
    assert torch.equal(batch["input_ids"][:, :-1], assigned[:, :-1])
    assert abs(float((batch["input_ids"][:, -1] == assigned[:, -1]).float().mean()) - 1 / 5) < 0.03  # s.e. 0.005
    shares = torch.bincount(batch["input_ids"][:, -1] - 3, minlength=5) / 6_000
    assert torch.all((shares - 1 / 5).abs() < 0.03)


def test_batches_are_a_function_of_seed_and_step_and_cover_the_lengths():
    batches = RecallBatches("assignment", 5, seed=3, fewest=2, most=6)
    lengths = [batches(step)["input_ids"].shape[1] for step in range(80)]
    assert set(lengths) == {2 * pairs + 3 for pairs in range(2, 7)}
    again = RecallBatches("assignment", 5, seed=3, fewest=2, most=6)
    assert torch.equal(again(41)["input_ids"], batches(41)["input_ids"])
    assert not torch.equal(
        RecallBatches("assignment", 5, seed=3, fewest=6, most=6)(0)["input_ids"],
        RecallBatches("assignment", 5, seed=4, fewest=6, most=6)(0)["input_ids"],
    )


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="task 'sorting' is unknown; one of assignment, copying"):
        RecallBatches("sorting", 5, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 <= fewest <= most"):
        RecallBatches("copying", 5, seed=0, fewest=7, most=6)
    with pytest.raises(ValueError, match="at least 1 variable and 2 values"):
        RecallVocabulary(variables=0)
    with pytest.raises(ValueError, match="at least 1"):
        copying(0, 3, generator=draw())
