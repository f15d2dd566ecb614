from __future__ import annotations

import numpy as np
import pytest
import torch

from trialist.data.packing import IGNORED
from trialist.data.walks import Graph, WalkBatches, coins, walks

GRAPH = Graph(nodes=7, letters=3, seed=2)


def test_every_letter_is_a_permutation_and_they_do_not_commute() -> None:
    pointers = GRAPH.pointers
    assert pointers.shape == (3, 7)
    assert all(sorted(row) == list(range(7)) for row in pointers.tolist())
    assert not np.array_equal(pointers[0][pointers[1]], pointers[1][pointers[0]])
    assert not np.array_equal(pointers, Graph(7, 3, seed=3).pointers)


def test_answers_of_a_walk_are_found_by_following_its_letters_one_by_one() -> None:
    batch = walks(GRAPH, 5, 4, generator=np.random.default_rng(0))
    assert batch["input_ids"].shape == batch["labels"].shape == (5, 6)
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        where = tokens[0]
        assert labels[:2] == [IGNORED] * 2
        for place, letter in enumerate(tokens[1:-1], start=1):
            where = int(GRAPH.pointers[letter - 7][where])
            assert labels[place + 1] == where  # what the letter at `place` is to be followed by
        assert tokens[-1] == GRAPH.end == 10


def test_coins_lead_to_one_of_two_nodes_equally_often() -> None:
    batch = coins(GRAPH, 500, 3, generator=np.random.default_rng(1))
    assert batch["input_ids"].shape == (500, 7)
    heads = 0
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        for question in range(3):
            node, letter = tokens[2 * question], tokens[2 * question + 1] - 7
            ways = GRAPH.ways[:, letter, node].tolist()
            assert labels[2 * question + 2] in ways
            assert ways[0] == GRAPH.pointers[letter][node] != ways[1]
            assert labels[2 * question + 1] == IGNORED
            heads += labels[2 * question + 2] == ways[0]
    assert heads / 1500 == pytest.approx(0.5, abs=0.05)


def test_starting_nodes_letters_and_answers_are_evenly_spread() -> None:
    batch = walks(GRAPH, 20_000, 6, generator=np.random.default_rng(4))
    for answers, choices in (
        (batch["input_ids"][:, 0], 7),
        (batch["labels"][:, 7], 7),
        (batch["input_ids"][:, 3] - 7, 3),
    ):
        shares = torch.bincount(answers, minlength=choices) / 20_000
        assert (shares - 1 / choices).abs().max() < 0.02


def test_walks_grow_to_their_full_length_during_the_rise() -> None:
    batches = WalkBatches("walks", GRAPH, 2, seed=1, hops=4, rise=8)
    assert [batches.hops_at(step) for step in range(9)] == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert batches(3)["input_ids"].shape == (2, 4)
    assert WalkBatches("coins", GRAPH, 2, seed=1, hops=4, rise=8).hops_at(0) == 4


def test_a_batch_depends_on_seed_and_step_only() -> None:
    batches = WalkBatches("walks", GRAPH, 3, seed=5, hops=4)
    assert torch.equal(batches(2)["input_ids"], batches(2)["input_ids"])
    assert not torch.equal(batches(2)["input_ids"], batches(3)["input_ids"])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Graph(nodes=1), "at least 2 nodes and 1 letter, not 1 and 4"),
        (lambda: WalkBatches("walk", GRAPH, 2, 0, 3), "task 'walk' is unknown; one of walks, coins"),
        (lambda: WalkBatches("walks", GRAPH, 2, 0, 0), "expected hops >= 1"),
        (
            lambda: walks(GRAPH, 0, 2, generator=np.random.default_rng(0)),
            "rows and hops must be at least 1, not 0 and 2",
        ),
    ],
)
def test_impossible_tasks_are_refused(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
