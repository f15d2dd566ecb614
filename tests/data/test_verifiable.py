from __future__ import annotations

import json
import re

import pytest

from trialist.data.verifiable import arithmetic, last_number, read_verifiable, rewards, verified


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", "1234"),
        ("that makes $1,234,567.", "1234567"),
        ("12 apples and 3.", "3"),
        ("the answer is -3", "-3"),
        ("3.50 dollars", "3.50"),
        ("it is .5", ".5"),
        ("+7", "7"),
        ("10-7", "7"),
        ("(2)-7", "7"),
        ("10 - 7 = 3", "3"),
        ("the point (3,4)", "4"),
        ("1,2345", "2345"),
        ("no digits here", None),
        ("", None),
        ("...", None),
    ],
)
def test_the_last_signed_number_of_a_text(text, number):
    assert last_number(text) == number


def test_an_answer_is_compared_letter_for_letter_after_commas_are_gone():
    assert verified("So it is 1234.", "1,234")
    assert verified("So it is 1,234.", "1234")
    assert verified("-3", "-3")
    assert not verified("3", "-3")
    assert not verified("3.0", "3")


def test_a_completion_without_a_number_is_wrong_whatever_the_answer():
    assert not verified("I do not know", "0")
    assert not verified("I do not know", "nothing")


def test_the_reward_counts_the_right_answer_and_punishes_what_does_not_end():
    found = rewards(
        ["it is 5", "it is 6", "it is 5", ""], ["5"] * 4, [True, True, False, False], accepted=10.0, unfinished=-10.0
    )
    assert found == [10.0, 0.0, -10.0, -10.0]


def test_generated_questions_have_the_answer_that_arithmetic_gives_them():
    rows = arithmetic(200, seed=3)
    for row in rows:
        a, sign, b = re.fullmatch(r"What is (\d+) ([-+]) (\d+)\?", row["prompt"]).groups()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert any(row["answer"].startswith("-") for row in rows)
    assert rows == arithmetic(200, seed=3)
    assert read_verifiable("arithmetic", max_examples=7) == arithmetic(7, seed=0)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_of_a_worked_solution_the_last_answer_counts(tmp_path):
    data = write(tmp_path / "rows.jsonl", {"question": "how many?", "answer": "48/2 = 24\n#### 1,024"})
    assert read_verifiable(data, columns="prompt=question") == [{"prompt": "how many?", "answer": "1024"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "how many?", "answer": "many"}, "row 2: no number in 'answer' 'many'"),
        ({"prompt": " ", "answer": "2"}, "row 2: 'prompt' is empty"),
        ({"prompt": "how many?"}, "row 2|line 2"),
    ],
)
def test_rows_that_cannot_be_verified_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_verifiable(write(tmp_path / "rows.jsonl", {"prompt": "how many?", "answer": "2"}, row))


def test_messages_need_role_and_content(tmp_path):
    with pytest.raises(ValueError, match="row 1: 'prompt' must be a string, or a list of messages"):
        read_verifiable(write(tmp_path / "rows.jsonl", {"prompt": [{"role": "user"}], "answer": "2"}))


def test_messages_must_end_before_the_answer(tmp_path):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(ValueError, match="row 1: 'prompt' ends with the assistant's turn"):
        read_verifiable(write(tmp_path / "rows.jsonl", {"prompt": messages, "answer": "2"}))
