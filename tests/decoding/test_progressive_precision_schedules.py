from __future__ import annotations

import json

import pytest
import torch

from trialist.decoding.precision.schedules import (
    ConfidenceSchedule,
    LearnedSchedule,
    PiecewiseSchedule,
    PromptPass,
    RandomSchedule,
    ReversedSchedule,
    StaticSchedule,
    load_schedule,
    parse_schedule,
    save_schedule,
)
from trialist.training.precision_schedule import PrecisionClassifier


def prompts(rows: int, columns: int = 5) -> PromptPass:
    return PromptPass((columns,) * rows, torch.ones(rows, columns))


def followed(schedule, probabilities: list[list[float]]) -> list[list[int]]:
    """What rows ask for, step by step, when their most likely tokens have these probabilities (steps, R)."""
    state = schedule.start(prompts(len(probabilities[0])))
    asked = []
    for step, row in enumerate(probabilities):
        p = torch.tensor(row)
        logits = torch.stack([p, (1 - p) / 2, (1 - p) / 2], 1).log() + 3.0  # (R, 3)
        asked.append(schedule.next(state, step, logits))
    return asked


@pytest.mark.parametrize(
    ("schedule", "bits"),
    [
        (StaticSchedule(4, 2, 0), [2, 2, 2, 2, 2]),
        (StaticSchedule(4, 2, 3), [4, 4, 4, 2, 2]),
        (StaticSchedule(3, 2, 99), [3, 3, 3, 3, 3]),
        (PiecewiseSchedule(((0, 4), (1, 3), (4, 2))), [4, 3, 3, 3, 2]),
        (ReversedSchedule(StaticSchedule(4, 2, 3), 5), [2, 2, 4, 4, 4]),
    ],
    ids=["no high step", "three", "all", "piecewise", "reversed"],
)
def test_a_fixed_schedule_gives_the_bits_of_the_worked_case(schedule, bits):
    assert schedule.over(5) == bits
    state = schedule.start(prompts(3))
    assert [schedule.next(state, step, None) for step in range(5)] == [[b] * 3 for b in bits]


def test_random_order_has_each_precision_as_often_and_depends_on_its_seed_alone():
    of = PiecewiseSchedule(((0, 4), (5, 3), (12, 2)))
    orders = [RandomSchedule(of, 17, seed).over(17) for seed in range(4)]
    assert all(sorted(order) == sorted(of.over(17)) for order in orders)
    assert RandomSchedule(of, 17, 2).over(17) == orders[2]
    assert len({tuple(order) for order in orders}) == 4
    assert RandomSchedule(of, 17).at(17) == 2


@pytest.mark.parametrize(
    "schedule", [StaticSchedule(4, 3, 7), parse_schedule("4@0,3@4,2@9")], ids=["static", "piecewise"]
)
def test_bits_never_rise_but_in_the_controls(schedule):
    bits = schedule.over(20)
    assert bits == sorted(bits, reverse=True)
    assert ReversedSchedule(schedule, 20).over(20) == sorted(bits)


def test_confidence_switches_each_row_for_good_where_it_is_surer_than_the_window_before():
    # window 3, k 1: row 0 has mean 0.5 and std 0.0816 behind step 2, so 0.58 is below the mark of 0.5816 and 0.6 above the next
    first = [0.4, 0.5, 0.6, 0.58, 0.62, 0.3, 0.3]
    second = [0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5]  # never surer
    asked = followed(ConfidenceSchedule(4, 2, window=3, k=1.0), [list(pair) for pair in zip(first, second)])
    mean, std = (0.5 + 0.6 + 0.58) / 3, 0.0432
    assert first[4] > mean + std
    assert [row[0] for row in asked] == [4, 4, 4, 4, 2, 2, 2]
    assert [row[1] for row in asked] == [4] * 7


def test_words_of_a_schedule_become_its_parts():
    assert parse_schedule("4@0, 3@85,2@170") == PiecewiseSchedule(((0, 4), (85, 3), (170, 2)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StaticSchedule(2, 3, 4), "high=2 is below low=3"),
        (lambda: StaticSchedule(4, 3, -1), "high_steps=-1"),
        (lambda: StaticSchedule(9, 3, 1), "9 bits"),
        (lambda: PiecewiseSchedule(((3, 4),)), "begins at step 0"),
        (lambda: PiecewiseSchedule(()), "there are no parts"),
        (lambda: parse_schedule("3@0,4@7"), "precision only falls, and 4 bits follow 3"),
        (lambda: parse_schedule("4@0,3@7,2@7"), "steps of a schedule ascend"),
        (lambda: parse_schedule("4@0,3"), "'3' is no part of a schedule"),
        (lambda: parse_schedule("4@0,3@-2"), "'3@-2' is no part"),
        (lambda: ConfidenceSchedule(4, 2, window=1), "window=1"),
        (lambda: RandomSchedule(StaticSchedule(4, 2, 1), 0), "steps=0"),
        (lambda: LearnedSchedule(PrecisionClassifier(2, 4, 3), 4, 2, (0, 5)), "3 classes for 2 high_steps"),
        (lambda: LearnedSchedule(PrecisionClassifier(2, 4, 2), 4, 2, (5, 0)), "ascending"),
    ],
)
def test_schedules_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "schedule",
    [
        StaticSchedule(4, 3, 85),
        parse_schedule("4@0,3@85,2@170"),
        ReversedSchedule(StaticSchedule(4, 2, 3), 9),
        RandomSchedule(parse_schedule("4@0,2@5"), 11, 3),
        ConfidenceSchedule(3, 2, 7, 0.5),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_a_saved_schedule_comes_back(schedule, tmp_path):
    save_schedule(schedule, tmp_path / "new" / "folder")
    assert load_schedule(tmp_path / "new" / "folder") == schedule


def test_a_saved_classifier_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    schedule = LearnedSchedule(PrecisionClassifier(3, 4, 2, dropout=0.3), 4, 2, (0, 8), prefill_bits=4)
    save_schedule(schedule, tmp_path)
    again = load_schedule(tmp_path)
    assert (again.high, again.low, again.high_steps, again.prefill_bits) == (4, 2, (0, 8), 4)
    assert not again.classifier.training
    keys, values, mask = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.ones(2, 5)
    assert torch.equal(again.classifier(keys, values, mask), schedule.classifier.eval()(keys, values, mask))


def test_a_folder_without_a_schedule_and_a_damaged_one_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no schedule.json"):
        load_schedule(tmp_path)
    (tmp_path / "schedule.json").write_text(json.dumps({"kind": "statisch", "high": 3}))
    with pytest.raises(ValueError, match="kind 'statisch' is unknown"):
        load_schedule(tmp_path)
    (tmp_path / "schedule.json").write_text(json.dumps({"kind": "static", "high": 3}))
    with pytest.raises(ValueError, match="is damaged"):
        load_schedule(tmp_path)


@pytest.mark.parametrize("spoilt", [b"", b"not tensors", b"{"], ids=["empty", "text", "cut"])
def test_a_damaged_classifier_is_refused(tmp_path, spoilt):
    save_schedule(LearnedSchedule(PrecisionClassifier(3, 4, 2), 4, 2, (0, 8)), tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(spoilt)
    with pytest.raises(ValueError, match="is damaged"):
        load_schedule(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", '"static"'])
def test_a_file_that_is_no_schedule_is_refused(tmp_path, text):
    (tmp_path / "schedule.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        load_schedule(tmp_path)
