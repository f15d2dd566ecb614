from __future__ import annotations

import numpy as np
import pytest
import torch

from trialist.data.memory_tasks import SYMBOLS, MemoryBatches, parity, selective_copying, vocabulary_size


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("symbols", [2, 8, 14])
def test_selective_copying_asks_for_the_values_in_the_order_in_which_they_stood(symbols: int) -> None:
    batch = selective_copying(40, 11, 3, symbols, generator=generator())
    blank, marker = symbols, symbols + 1
    assert vocabulary_size(symbols) == marker + 1
    assert batch["input_ids"].shape == batch["labels"].shape == (40, 11 + 3 + 1)
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        values = [token for token in tokens[:11] if token != blank]
        assert len(values) == 3
        assert max(values) < symbols
        assert tokens[11:] == [marker] * 4
        assert labels == [-100] * 12 + values


def test_places_and_values_of_selective_copying_are_uniform() -> None:
    batch = selective_copying(6000, 5, 2, generator=generator())
    taken = (batch["input_ids"][:, :5] != SYMBOLS).float().mean(0)
    torch.testing.assert_close(taken, torch.full((5,), 0.4), rtol=0, atol=0.03)
    shares = batch["labels"][:, 6:].flatten().bincount(minlength=SYMBOLS) / 12000
    torch.testing.assert_close(shares, torch.full((SYMBOLS,), 1 / SYMBOLS), rtol=0, atol=0.015)


def test_parity_is_that_of_the_bits_up_to_and_with_the_token_before_the_label() -> None:
    batch = parity(9, 7, first=3, generator=generator())
    assert batch["input_ids"].shape == (9, 8)
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        assert tokens[7] == SYMBOLS
        assert labels[:3] == [-100] * 3
        for place in range(3, 8):
            assert labels[place] == sum(tokens[:place]) % 2


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    for task in ("selective-copying", "parity"):
        source = MemoryBatches(task, 4, 7, length=9, values=2, first=5)  # type: ignore[arg-type]
        assert all(torch.equal(source(3)[name], source(3)[name]) for name in ("input_ids", "labels"))
        assert not torch.equal(source(3)["input_ids"], source(4)["input_ids"])
        assert not torch.equal(source(3)["input_ids"], MemoryBatches(task, 4, 8, 9, 2, 5)(3)["input_ids"])  # type: ignore[arg-type]
        assert int((source(0)["labels"][0] >= 0).sum()) == {"selective-copying": 2, "parity": 5}[task]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: selective_copying(1, 3, 4, generator=generator()), "values <= length, not 1, 8, 4 and 3"),
        (lambda: selective_copying(0, 3, 1, generator=generator()), "rows >= 1"),
        (lambda: selective_copying(1, 3, 1, 1, generator=generator()), "symbols >= 2"),
        (lambda: parity(1, 3, 4, generator=generator()), "first <= length, not 1, 4 and 3"),
        (lambda: MemoryBatches("copying", 1, 0, 3)(0), "one of selective-copying, parity"),  # type: ignore[arg-type]
    ],
)
def test_sizes_that_cannot_be_are_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
