from __future__ import annotations

import numpy as np
import pytest
import torch

from trialist.data.key_facts import VOCABULARY, FactBatches, FactVocabulary, draw_facts, fact_batch

SMALL = FactVocabulary(keys=7, classes=3)


@pytest.mark.parametrize("kind", ["random", "rule"])
def test_no_pair_of_keys_comes_twice_in_any_set(kind: str) -> None:
    first, second = draw_facts([30, 19], seed=1, kind=kind, vocabulary=SMALL)
    pairs = [tuple(pair) for pair in torch.cat([first, second])[:, :2].tolist()]
    assert sorted(pairs) == [(a, 7 + b) for a in range(7) for b in range(7)]


def test_tokens_of_keys_and_values_do_not_overlap() -> None:
    (facts,) = draw_facts([4000], seed=0)
    for column, (low, high) in enumerate([(0, 256), (256, 512), (512, 768)]):
        assert low <= int(facts[:, column].min()) < int(facts[:, column].max()) < high
    assert VOCABULARY.size == 768


def test_random_values_are_uniform_and_independent_of_both_keys() -> None:
    vocabulary = FactVocabulary(keys=200, classes=3)
    (facts,) = draw_facts([36_000], seed=3, vocabulary=vocabulary)
    values = facts[:, 2] - 400
    counts = np.bincount(values, minlength=9)
    chi_square = ((counts - 4000) ** 2 / 4000).sum()
    assert chi_square < 30  # 8 degrees of freedom: exceeded once in 5,000 draws
    for key in (facts[:, 0], facts[:, 1] - 200):
        assert abs(np.corrcoef(key, values)[0, 1]) < 0.03


def test_the_value_by_rule_depends_on_the_classes_of_the_keys_alone() -> None:
    (facts,) = draw_facts([49], seed=2, kind="rule", vocabulary=SMALL)
    table = torch.full((7, 7), -1)
    table[facts[:, 0], facts[:, 1] - 7] = facts[:, 2] - 14
    assert all(len(set((row // 3).tolist())) == 1 for row in table)
    assert all(len(set((column % 3).tolist())) == 1 for column in table.T)
    assert len(set((table // 3).flatten().tolist())) > 1


def test_facts_are_a_function_of_the_seed() -> None:
    one, same, other = (draw_facts([20], seed=seed, vocabulary=SMALL)[0] for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_epoch_holds_each_fact_once_and_in_another_order() -> None:
    (facts,) = draw_facts([10], seed=0, vocabulary=SMALL)
    batches = FactBatches(facts, 4, seed=9)
    rows = torch.cat([batches(step)["input_ids"] for step in range(5)])  # two epochs in five batches
    first, second = rows[:10].tolist(), rows[10:].tolist()
    assert sorted(first) == sorted(second) == sorted(facts.tolist())
    assert first != second


def test_a_batch_is_a_pure_function_of_its_step_even_when_it_spans_epochs() -> None:
    (facts,) = draw_facts([5], seed=0, vocabulary=SMALL)
    batches = FactBatches(facts, 13, seed=9)
    late = batches(7)["input_ids"]
    assert torch.equal(FactBatches(facts, 13, seed=9)(7)["input_ids"], late)
    assert late.shape == (13, 3)


def test_only_the_value_is_labelled() -> None:
    batch = fact_batch(torch.tensor([[1, 9, 15], [2, 8, 20]]))
    assert batch["labels"].tolist() == [[-100, -100, 15], [-100, -100, 20]]
    assert batch["input_ids"].tolist() == [[1, 9, 15], [2, 8, 20]]


@pytest.mark.parametrize("counts", [[50], [25, 25], [0, 3], []])
def test_more_facts_than_pairs_and_empty_sets_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="7 x 7 pairs of keys"):
        draw_facts(counts, seed=0, vocabulary=SMALL)


def test_unknown_kinds_and_empty_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="'random' or 'rule'"):
        draw_facts([3], seed=0, kind="grammar", vocabulary=SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both must be at least 1"):
        FactBatches(torch.zeros(3, 3), 0, seed=0)
    with pytest.raises(ValueError, match="2 classes"):
        FactVocabulary(classes=1)
