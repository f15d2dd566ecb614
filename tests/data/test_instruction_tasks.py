from __future__ import annotations

import numpy as np
import pytest
import torch

from trialist.data.instruction_tasks import FRAMES, KINDS, ORDERS, PARTS, MixedText, Symbols

SYMBOLS = Symbols(7, digits=5, letters=6, hops=3)


def parts(symbols, kind, count=40, part="train"):
    """Question and answer of each row as lists, without tags and marks."""
    rows = symbols.rows(kind, count, part)
    found = []
    for ids, labels in zip(rows["input_ids"].tolist(), rows["labels"].tolist(), strict=True):
        answer = [token for token in labels if token != -100]
        assert ids[-len(answer) :] == answer
        assert ids[0] == symbols.start
        assert ids[-len(answer) - 1] == symbols.ask
        assert answer[-1] == symbols.end
        found.append((ids[2 : -len(answer) - 1], answer[:-1]))
    return found


def test_a_chain_is_written_out_step_by_step():
    s = SYMBOLS
    operations = {
        s.first_operation: int.__add__,
        s.first_operation + 1: int.__sub__,
        s.first_operation + 2: int.__mul__,
    }
    for asked, answer in parts(s, "reasoning"):
        value, steps = asked[0], []
        for operation, right in zip(asked[1::2], asked[2::2], strict=True):
            result = operations[operation](value, right) % 5
            steps += [value, operation, right, s.ask, result]
            value = result
        assert answer == steps


def test_a_pattern_goes_on_as_the_text_does():
    s = SYMBOLS
    for asked, answer in parts(s, "pattern"):
        a, b = (letter - s.first_letter for letter in asked[-2:])
        for letter in answer:
            a, b = b, int(s.successors[a, b])
            assert letter == s.first_letter + b
        assert len(answer) == 3


def test_a_format_has_the_order_and_the_frame_that_were_asked_for():
    s, seen = SYMBOLS, set()
    for asked, answer in parts(s, "format", 200):
        order, frame, *payload = asked
        w, x, y, z = payload
        wanted = [[w, x, y, z], [z, y, x, w], [x, y, z, w], [y, z, w, x]][order - s.first_order]
        assert answer == [frame, *wanted, frame + 1]
        seen.add((order, frame))
    assert len(seen) == ORDERS * FRAMES


def test_a_long_format_has_twice_the_letters():
    (asked, answer), *_ = parts(SYMBOLS, "long-format")
    payload = asked[2:]
    assert len(payload) == 8
    assert answer[1:-1] in [payload, payload[::-1], payload[1:] + payload[:1], payload[4:] + payload[:4]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_parts_and_no_two_rows_ask_the_same(kind):
    s = Symbols(3, digits=4, letters=5, hops=2, payload=2)  # few questions, so that chance would repeat them
    key = (lambda asked: tuple(asked[-2:])) if kind == "pattern" else tuple  # of a pattern its last two letters decide
    counts = {"train": 150, "validation": 70, "test": 70}
    asked = {part: [question for question, _ in parts(s, kind, count, part)] for part, count in counts.items()}
    for part, questions in asked.items():
        assert len({tuple(question) for question in questions}) == counts[part]
    keys = [{key(question) for question in questions} for questions in asked.values()]
    assert len(set.union(*keys)) == sum(map(len, keys))


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_what_can_be_asked_is_for_training_and_a_quarter_each_for_the_others(kind):
    s = Symbols(3, digits=5, letters=6, hops=2, payload=2)
    drawn = getattr(s, f"_ask_{kind.removeprefix('long-')}")(kind, 4000, np.random.default_rng(0))
    coins = s._pair_parts(drawn) if kind == "pattern" else s._coins(drawn)
    shares = {part: sum(PARTS[coin] == part for coin in coins.tolist()) / 4000 for part in set(PARTS)}
    assert shares == pytest.approx({"train": 0.5, "validation": 0.25, "test": 0.25}, abs=0.05)


def test_more_rows_than_there_are_different_questions_are_refused():
    few = Symbols(3, digits=2, hops=1)  # twelve chains
    assert len(few.rows("reasoning", 3, "train")["labels"]) == 3
    with pytest.raises(
        ValueError, match=r"different questions of reasoning for train, and 20 are needed.*digits or hops"
    ):
        few.rows("reasoning", 20, "train")


def test_rows_are_the_same_at_every_call_and_others_for_another_part_or_seed():
    rows = SYMBOLS.rows("format", 5, "train")["input_ids"]
    assert torch.equal(rows, Symbols(7, digits=5, letters=6, hops=3).rows("format", 5, "train")["input_ids"])
    others = [
        SYMBOLS.rows("format", 5, "test"),
        Symbols(8, digits=5, letters=6, hops=3).rows("format", 5, "train"),
    ]
    assert all(not torch.equal(rows, other["input_ids"]) for other in others)


def test_the_text_before_has_operations_letters_and_frames_and_no_question():
    s = SYMBOLS
    batch = MixedText(s, 40, 17)(4)["input_ids"]
    assert batch.shape == (40, 17)
    assert int(batch.max()) < s.first_tag + len(KINDS) + 2  # no end
    assert not ((batch >= s.first_order) & (batch < s.first_frame)).any()
    assert not ((batch >= s.first_tag) & (batch != s.ask)).any()
    operations = {0: int.__add__, 1: int.__sub__, 2: int.__mul__}
    for row in [*batch[::5].tolist(), *batch[4::5].tolist()]:
        for left, operation, right, mark, result in (row[at : at + 5] for at in range(0, 15, 5)):
            assert mark == s.ask
            assert result == operations[operation - s.first_operation](left, right) % 5
    letters = MixedText(s, 120, 40)(0)["input_ids"][1::5] - s.first_letter
    usual = s.successors[letters[:, :-2].numpy(), letters[:, 1:-1].numpy()] == letters[:, 2:].numpy()
    assert 0.85 < usual.mean() < 0.97  # 0.9, and a sixth of the rest by chance
    orders = [
        lambda w, x, y, z: [w, x, y, z],
        lambda w, x, y, z: [z, y, x, w],
        lambda w, x, y, z: [x, y, z, w],
        lambda w, x, y, z: [y, z, w, x],
    ]
    for row in MixedText(s, 120, 18)(0)["input_ids"][2::5].tolist():  # three times four letters in a frame
        assert row[::6] == [row[0]] * 3
        assert row[5::6] == [row[0] + 1] * 3
        first, second, third = (row[at : at + 4] for at in (1, 7, 13))
        assert any(order(*first) == second and order(*second) == third for order in orders)
    expressions = MixedText(s, 120, 16)(0)["input_ids"][3::5]  # three operations, four numbers and the mark
    assert torch.equal(expressions[:, :8], expressions[:, 8:])
    assert (expressions[:, 7] == s.ask).all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="expected digits >= 2"):
        Symbols(0, digits=1)
    with pytest.raises(ValueError, match="kind 'poetry' is unknown"):
        SYMBOLS.rows("poetry", 1, "train")


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_longer_than_said(kind):
    for symbols in (SYMBOLS, Symbols(0, hops=1, payload=9), Symbols(0, hops=1, payload=2)):
        assert symbols.rows(kind, 2, "test")["input_ids"].shape[1] <= symbols.longest
        assert int(symbols.rows(kind, 50, "test")["input_ids"].max()) < symbols.size
