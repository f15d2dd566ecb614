from __future__ import annotations

import pytest
import torch

from trialist.data.instruction_tasks import FRAMES, KINDS, ORDERS, Epochs, MixedText, Symbols

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


def test_tests_ask_what_training_has_not_asked():
    s = Symbols(3, digits=3, letters=5, hops=2)  # few chains, so that chance would repeat them
    for kind, key in (("reasoning", tuple), ("pattern", lambda asked: tuple(asked[-2:]))):
        asked = {
            part: {key(question) for question, _ in parts(s, kind, 400, part)}
            for part in ("train", "validation", "test")
        }
        assert not asked["train"] & (asked["validation"] | asked["test"])


def test_rows_are_the_same_at_every_call_and_others_for_another_part_draw_or_seed():
    rows = SYMBOLS.rows("format", 5, "train")["input_ids"]
    assert torch.equal(rows, Symbols(7, digits=5, letters=6, hops=3).rows("format", 5, "train")["input_ids"])
    others = [
        SYMBOLS.rows("format", 5, "test"),
        SYMBOLS.rows("format", 5, "train", draw=1),
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
    for row in batch[::4].tolist():
        for left, operation, right, mark, result in (row[at : at + 5] for at in range(0, 15, 5)):
            assert mark == s.ask
            assert result == operations[operation - s.first_operation](left, right) % 5
    letters = MixedText(s, 120, 40)(0)["input_ids"][1::4] - s.first_letter
    usual = s.successors[letters[:, :-2].numpy(), letters[:, 1:-1].numpy()] == letters[:, 2:].numpy()
    assert 0.85 < usual.mean() < 0.97  # 0.9, and a sixth of the rest by chance
    frames = MixedText(s, 120, 12)(0)["input_ids"][2::4]
    assert torch.equal(frames[:, :6], frames[:, 6:])
    expressions = MixedText(s, 120, 16)(0)["input_ids"][3::4]  # three operations, four numbers and the mark
    assert torch.equal(expressions[:, :8], expressions[:, 8:])
    assert (expressions[:, 7] == s.ask).all()


def test_batches_of_any_size_pass_the_rows_in_the_same_order():
    rows = {"input_ids": torch.arange(7)[:, None], "labels": torch.arange(7)[:, None]}

    def passed(size, steps):
        return torch.cat([Epochs(rows, size, seed=3)(step)["input_ids"] for step in range(steps)]).flatten().tolist()

    assert passed(2, 14) == passed(4, 7) == passed(14, 2)
    assert sorted(passed(7, 1)) == list(range(7))
    assert passed(7, 2)[:7] != passed(7, 2)[7:]


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
