from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

from trialist.data.verifiable import arithmetic, read_verifiable, rewards


def test_the_reward_counts_the_right_answer_and_punishes_what_does_not_end():
    found = rewards(
        ["it is 5", "it is 6", "it is 5", ""],
        ["5"] * 4,
        ["number"] * 4,
        [True, True, False, False],
        accepted=10.0,
        unfinished=-10.0,
    )
    assert found == [10.0, 0.0, -10.0, -10.0]


def test_generated_questions_have_the_answer_that_arithmetic_gives_them():
    rows = arithmetic(200, seed=3)
    for row in rows:
        a, sign, b = re.fullmatch(r"What is (\d+) ([-+]) (\d+)\?", row["prompt"]).groups()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert any(row["answer"].startswith("-") for row in rows)
    assert rows == arithmetic(200, seed=3)
    read = read_verifiable("arithmetic", max_examples=7)
    assert read == [{**row, "verifier": "number"} for row in arithmetic(7, seed=0)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_of_a_worked_solution_the_last_answer_counts(tmp_path):
    data = write(tmp_path / "rows.jsonl", {"question": "how many?", "answer": "48/2 = 24\n#### 1,024"})
    assert read_verifiable(data, columns="prompt=question") == [
        {"prompt": "how many?", "answer": "1024", "verifier": "number"}
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "how many?", "answer": "many"}, "row 2: 'answer' cannot be verified: no number in 'many'"),
        ({"prompt": "how many?", "answer": "#### 5 apples of 7"}, "row 2: .* more than one number in '5 apples of 7'"),
        (
            {"prompt": "how many?", "answer": "2", "verifier": "numbers"},
            "row 2: .* no verifier 'numbers'; there are number,",
        ),
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


def test_a_row_may_name_its_own_verifier(tmp_path):
    rows = [{"prompt": "?", "answer": "2", "verifier": None}, {"prompt": "?", "answer": "x^2", "verifier": "math"}]
    if find_spec("math_verify") is None:
        pytest.skip("the extra `eval` is not installed")
    found = read_verifiable(write(tmp_path / "rows.jsonl", *rows))
    assert [(row["verifier"], row["answer"]) for row in found] == [("number", "2"), ("math", "\\boxed{x^2}")]


def test_whole_numbers_in_a_column_of_floats_stay_whole(tmp_path):
    """What pandas makes of integers with a gap."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [72.0, 5.5]}), tmp_path / "rows.parquet")
    assert [row["answer"] for row in read_verifiable(str(tmp_path / "rows.parquet"))] == ["72", "5.5"]
