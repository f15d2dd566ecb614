from __future__ import annotations

import numpy as np
import pytest

from trialist.data.preference_task import CONTENT, END, FILLER, SIGNAL, PreferenceTask


def body(answer: list[int]) -> list[int]:
    assert answer[-1] == END
    assert END not in answer[:-1]
    return answer[:-1]


def right(task: PreferenceTask, pairs: list, side: str) -> np.ndarray:
    return task.right_answers(np.array([pair.prompt for pair in pairs]), [body(getattr(pair, side)) for pair in pairs])


@pytest.mark.parametrize("setting", ["first", "last"])
def test_chosen_answers_are_right_and_rejected_ones_wrong_where_it_decides(setting: str) -> None:
    task = PreferenceTask(setting, seed=3)
    pairs = task.pairs(200, 5, longer=0.75)
    assert right(task, pairs, "chosen").all()
    assert not right(task, pairs, "rejected").any()


def test_in_the_last_setting_the_content_of_both_answers_is_right_equally_often() -> None:
    task = PreferenceTask("last", seed=3, right=0.6)
    pairs = task.pairs(800, 5, longer=0.5)
    prompts = np.array([pair.prompt for pair in pairs])
    shares = [
        (np.array([getattr(pair, side)[:SIGNAL] for pair in pairs]) == task.content(prompts)).all(1).mean()
        for side in ("chosen", "rejected")
    ]
    assert shares == pytest.approx([0.6, 0.6], abs=0.06)


@pytest.mark.parametrize("longer", [0.0, 0.75, 1.0])
def test_the_chosen_answer_is_longer_as_often_as_asked(longer: float) -> None:
    pairs = PreferenceTask("first", seed=0).pairs(400, 1, longer=longer)
    found = [len(pair.chosen) > len(pair.rejected) for pair in pairs]
    assert np.mean(found) == pytest.approx(longer, abs=0.06)
    assert all(len(pair.chosen) != len(pair.rejected) for pair in pairs)


def test_a_wrong_answer_differs_in_one_to_three_tokens_of_content() -> None:
    task = PreferenceTask("first", seed=1)
    pairs = task.pairs(200, 1, longer=0.5)
    differing = [
        sum(a != b for a, b in zip(pair.chosen[:SIGNAL], pair.rejected[:SIGNAL], strict=True)) for pair in pairs
    ]
    assert set(differing) == {1, 2, 3}
    assert all(CONTENT <= token < FILLER for pair in pairs for token in pair.rejected[:SIGNAL])


def test_answers_to_imitate_are_right_as_often_as_asked_and_of_the_mean_length() -> None:
    task = PreferenceTask("first", seed=1, right=0.6)
    examples = task.examples(2000, 1)
    prompts, answers = np.array([p for p, _ in examples]), [body(a) for _, a in examples]
    assert task.right_answers(prompts, answers).mean() == pytest.approx(0.6, abs=0.04)
    assert np.mean([len(answer) for answer in answers]) == pytest.approx(25, abs=1.5)


def test_functions_and_data_follow_their_seeds() -> None:
    task, other = PreferenceTask("first", seed=1), PreferenceTask("first", seed=2)
    assert task.pairs(3, 1, longer=0.5) == PreferenceTask("first", seed=1).pairs(3, 1, longer=0.5)
    assert task.pairs(3, 1, longer=0.5) != task.pairs(3, 2, longer=0.5)
    assert not np.array_equal(task.functions, other.functions)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match="one of first, last, not 'middle'"):
        PreferenceTask("middle", seed=0)
