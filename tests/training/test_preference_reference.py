"""The reference's log-probabilities: what they are, where they are kept, and how calls go on and share them out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from trialist.data.preferences import PreferencePair
from trialist.data.tokenizers import bpe_tokenizer, byte_tokenizer
from trialist.objectives.preference_rows import preference_row
from trialist.training import preference_reference, reference_logprobs
from trialist.training.preference_reference import reference_folder, tokenizer_difference

ROWS = [
    preference_row(PreferencePair([3, 4], [5, 6, 7], [8], 0)),
    preference_row(PreferencePair([9], [10], [11, 12, 13, 14], 1)),
    preference_row(PreferencePair([9, 8, 7], [10, 2], [11, 2], 2)),
    preference_row(PreferencePair([9], [1], [2], 3)),
    preference_row(PreferencePair([6, 9, 1], [2], [5, 2], 4)),
]
FIRST, SECOND, LAST = [2, 0], [1, 4], [3]
"""Rows of the three parts of two, the longest first"""


def never() -> Any:
    raise AssertionError("scored again")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Parts have two rows; collects those that are scored, as row numbers."""
    scored: list[list[int]] = []
    score = preference_reference._Reference.__call__

    def watched(reference: Any, part: np.ndarray) -> np.ndarray:
        scored.append(part.tolist())
        return score(reference, part)

    monkeypatch.setattr(preference_reference, "PART", 2)
    monkeypatch.setattr(preference_reference._Reference, "__call__", watched)
    return scored


def scored(model: Any, folder: Path | None, **options: Any) -> list[np.ndarray]:
    return reference_logprobs(model, ROWS, **{"digest": "a", "folder": folder, "say": lambda _: None, **options})


def assert_equal(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_values_are_those_of_the_model_and_stand_at_the_answers_tokens(llama: Any) -> None:
    model = llama()
    found = reference_logprobs(model, ROWS, batch=2)
    for row, values in zip(ROWS, found, strict=True):
        assert np.array_equal(values != 0, row["segments"] > 1)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([[9, 11, 12, 13, 14]])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(found[1][2:], [log_p[t, 11 + t] for t in range(4)], atol=1e-5)


def test_kept_values_are_read_to_the_bit(llama: Any, tmp_path: Path, parts: list[list[int]]) -> None:
    found = scored(llama(), tmp_path)
    assert parts == [FIRST, SECOND, LAST]
    assert_equal(scored(never, tmp_path), found)
    assert_equal(reference_logprobs(llama(), ROWS), found)
    assert not list(tmp_path.rglob("*.lock"))


def test_what_decides_about_the_bits_is_kept_apart(tmp_path: Path) -> None:
    changed = [{**ROWS[0], "input_ids": ROWS[0]["input_ids"] + 1}, *ROWS[1:]]
    cut = [{name: values[:-1] for name, values in ROWS[0].items()}, *ROWS[1:]]
    bfloat16 = torch.bfloat16
    names = {
        reference_folder(rows, digest, batch, dtype, share, tmp_path)
        for rows, digest, batch, dtype, share in (
            (ROWS, "a", 8, None, False), (ROWS, "b", 8, None, False), (ROWS, "a", 4, None, False),
            (ROWS, "a", 8, bfloat16, False), (ROWS, "a", 8, None, True), (changed, "a", 8, None, False),
            (cut, "a", 8, None, False),
        )
    }  # fmt: skip
    assert len(names) == 7


def test_an_interrupted_call_goes_on_with_the_parts_that_are_missing(
    llama: Any, tmp_path: Path, parts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_logprobs = preference_reference.answer_logprobs

    def interrupted(model: Any, input_ids: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if len(parts) == 2:
            raise KeyboardInterrupt
        return answer_logprobs(model, input_ids, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(preference_reference, "answer_logprobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scored(llama(), tmp_path)
    parts.clear()
    found = scored(llama(), tmp_path)
    assert parts == [SECOND, LAST]
    assert_equal(found, reference_logprobs(llama(), ROWS))


@pytest.mark.parametrize("finishes", [True, False], ids=["finishes", "dies"])
def test_a_part_that_another_process_is_at_comes_last(
    llama: Any, tmp_path: Path, parts: list[list[int]], finishes: bool
) -> None:
    """The other process, which is at the second part, goes on when the call says that it waits."""
    place = reference_folder(ROWS, "a", 8, None, False, tmp_path)
    place.mkdir()
    wanted = scored(llama(), tmp_path / "theirs")
    [theirs] = (tmp_path / "theirs").rglob("00001.safetensors")
    parts.clear()
    lock = FileLock(place / "00001.safetensors.lock")
    lock.acquire()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if finishes:
            os.replace(theirs, place / theirs.name)
        lock.release()

    assert_equal(scored(llama(), tmp_path, say=say), wanted)
    assert said == ["reference: waiting for another process, which scores 2 of the pairs"]
    assert parts == ([FIRST, LAST] if finishes else [FIRST, LAST, SECOND])


@pytest.mark.parametrize("size", [0, 20, -1])
def test_a_damaged_part_is_made_again(llama: Any, tmp_path: Path, parts: list[list[int]], size: int) -> None:
    found = scored(llama(), tmp_path)
    file = next(tmp_path.rglob("00001.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(next(tmp_path.rglob("00002.safetensors")).read_bytes() if size < 0 else whole[:size])
    parts.clear()
    assert_equal(scored(llama(), tmp_path), found)
    assert parts == [SECOND]
    assert file.read_bytes() == whole


def test_what_nothing_has_read_for_a_month_is_removed_from_the_cache(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path))
    ages = {"forgotten": 31, "read again": 31, "recent": 29}
    for name in ages:
        scored(llama(), None, digest=name)
    for name, days in ages.items():
        os.utime(reference_folder(ROWS, name, 8), (then := time.time() - days * 86_400, then))
    scored(never, None, digest="read again")
    assert [reference_folder(ROWS, name, 8).is_dir() for name in ages] == [False, True, True]


def test_a_reference_that_gives_no_numbers_is_named_with_the_row(llama: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[14] = torch.nan  # a token of row 1 alone, which predicts nothing more...
        model.get_input_embeddings().weight[13] = torch.nan  # ... and one that does
    with pytest.raises(ValueError, match="row 1: the reference's log-probabilities are not numbers"):
        reference_logprobs(model, ROWS, batch=1)


def test_tokenizers_differ_by_vocabulary_or_by_how_they_cut() -> None:
    first = bpe_tokenizer(["aab aab abb"] * 9, 262, cache=False)
    assert tokenizer_difference(first, first, ["aab"]) is None
    assert "tokens, the first" in str(tokenizer_difference(first, byte_tokenizer(), ["aab"]))
