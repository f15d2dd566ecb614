from __future__ import annotations

import json
import math

import pytest

from trialist.data.filter_preferences import FilterPreferences, filter_by_reward_model


def scored(gap: float, label: float | None = 1.0, kind: str | None = "non_contextual", **more) -> dict:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_reward": 1.0 + gap, "rejected_reward": 1.0, **more}
    return {**row, **({} if label is None else {"label_prob": label}), **({} if kind is None else {"pair_type": kind})}


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("probability", "label", "kept"),
    [
        (0.95, 1.0, False), (0.81, 1.0, False), (0.79, 1.0, True), (0.1, 1.0, True),
        (0.5, 0.5, False), (0.69, 0.5, False), (0.31, 0.5, False), (0.71, 0.5, True), (0.29, 0.5, True),
    ],
)  # fmt: skip
def test_what_the_model_has_right_by_a_fifth_is_left_out(probability, label, kept):
    assert bool(filter_by_reward_model([scored(logit(probability), label)])) is kept


def test_original_rows_always_stay():
    rows = [scored(9.0, 1.0, kind) for kind in ("original", None, "non_contextual")] + [scored(9.0, None, None)]
    assert filter_by_reward_model(rows) == [rows[0], rows[1], rows[3]]
    assert filter_by_reward_model(rows, keep_original=False) == []


def test_a_gap_of_zero_keeps_everything_and_order_and_columns_stay():
    rows = [scored(gap, note=str(gap)) for gap in (3.0, -2.0, 40.0, -40.0)]
    assert filter_by_reward_model(rows, min_gap=0) == rows
    assert [row["note"] for row in filter_by_reward_model(rows, min_gap=1)] == ["-40.0"]  # sure of the opposite


def test_rewards_come_from_one_call_where_a_function_is_given():
    calls = []

    def rewards(rows):
        calls.append(len(rows))
        return [(0.0, 5.0) if row["prompt"] == "wrong" else (5.0, 0.0) for row in rows]

    rows = [
        {"prompt": name, "chosen": "a", "rejected": "b", "pair_type": "neutral"} for name in ("right", "wrong", "right")
    ]
    assert filter_by_reward_model(rows, rewards) == [rows[1]]
    assert calls == [3]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [scored(1.0), {"prompt": "p", "chosen": "a", "rejected": "b"}],
            {},
            "row 2: 'chosen_reward' is None; score the rows",
        ),
        ([scored(float("nan"))], {}, "row 1: the rewards are nan and 1.0"),
        ([scored(1.0, label=-0.1)], {}, "row 1: label_prob is -0.1"),
        ([scored(1.0)], {"min_gap": 1.2}, "min_gap must be from 0 to 1, not 1.2"),
        ([scored(1.0)], {"rewards": lambda rows: []}, "0 pairs of rewards for 1 rows"),
    ],
)
def test_what_cannot_work_is_said(rows, options, message):
    with pytest.raises(ValueError, match=message):
        filter_by_reward_model(rows, **options)


def test_apply_writes_what_is_kept_and_counts_it(tmp_path):
    rows = [scored(9.0, 1.0, "original"), scored(9.0), scored(-1.0), scored(0.1, 0.5, "neutral")]
    rows = [{**row, "better": row.pop("chosen_reward")} for row in rows]
    source = tmp_path / "scored.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    apply = FilterPreferences(str(source), str(tmp_path / "kept.jsonl"), columns="chosen_reward=better")
    shown = apply(say=lambda text: None)
    assert (shown["original"], shown["non-contextual"], shown["neutral"], shown["kept"]) == (
        "1 of 1", "1 of 2", "0 of 1", "2 of 4 rows",
    )  # fmt: skip
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [row["chosen_reward"] for row in kept] == [10.0, 0.0]
    with pytest.raises(ValueError, match=r"kept.jsonl exists"):
        apply()
    with pytest.raises(ValueError, match="no row is left with a gap of 1"):
        FilterPreferences(
            str(source), str(tmp_path / "none.jsonl"), columns="chosen_reward=better", min_gap=1.0, filter_original=True
        )()


@pytest.mark.parametrize("label", ["high", 1.5, True])
def test_a_label_that_is_no_probability_is_named_with_its_row(label):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "label_prob": value} for value in (0.5, label)]
    with pytest.raises(ValueError, match=f"row 2: label_prob is {label!r}; a probability is a number from 0 to 1"):
        filter_by_reward_model(rows, lambda some: [(1.0, 0.0)] * len(some))
