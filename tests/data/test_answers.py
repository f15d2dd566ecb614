"""The judge of mathematical answers, in its process."""

from __future__ import annotations

import os
import time

import pytest

from trialist.data import answers
from trialist.data.answers import Judge

pytest.importorskip("math_verify", reason="the extra `eval` is not installed")
pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def judge():
    with Judge() as judge:
        yield judge


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [("18", "So she has 18 eggs. The answer is 18.", 1.0), ("18", "The answer is 19.", 0.0), ("$\\frac{1}{2}$", "$0.5$", 1.0),
     ("18", "", 0.0)],
)  # fmt: skip
def test_equal_values_are_right_however_they_are_written(judge, gold, answer, right):
    assert judge.verify(gold, answer) == right


def test_the_minerva_rules_look_at_the_final_answer(judge):
    doc = {"problem": "1+1", "solution": "It is $\\boxed{2}$.", "answer": "2"}
    said = "Final Answer: The final answer is $2$. I hope it is correct."
    assert judge.minerva(doc, said) == {"exact_match": 1.0, "math_verify": 1.0}
    assert judge.minerva(doc, "$3$")["exact_match"] == 0.0


def test_one_process_serves_all_questions_and_ends_with_its_judge():
    with Judge() as judge:
        judge.verify("1", "1")
        first = judge._process.pid
        judge.verify("2", "1")
        assert judge._process.pid == first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_question_without_end_is_stopped_counted_and_the_next_one_answered(monkeypatch):
    endless = (
        "import math_verify, time\nmath_verify.parse = lambda text: time.sleep(60) if 'loop' in text else [text]\n"
    )
    endless += "math_verify.verify = lambda gold, answer: gold == answer\n"
    monkeypatch.setattr(answers, "PROGRAM", endless + answers.PROGRAM)
    with Judge(seconds=0.5) as judge:
        assert judge.verify("1", "1") == 1.0
        begun = time.monotonic()
        assert judge.verify("1", "loop") == 0.0
        assert time.monotonic() - begun < 5
        assert judge.verify("1", "1") == 1.0
        assert judge.notes() == ("1 answers could not be judged within 0.5 s and count as wrong",)


def test_a_judge_that_dies_costs_one_answer(monkeypatch):
    deadly = "import math_verify, os\nmath_verify.parse = lambda text: os._exit(3) if 'die' in text else [text]\n"
    deadly += "math_verify.verify = lambda gold, answer: gold == answer\n"
    monkeypatch.setattr(answers, "PROGRAM", deadly + answers.PROGRAM)
    with Judge() as judge:
        assert judge.verify("1", "die") == 0.0
        assert judge.verify("1", "1") == 1.0
        assert len(judge.notes()) == 1


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(answers, "PROGRAM", "import sys\nsys.modules['math_verify'] = None\n" + answers.PROGRAM)
    with Judge() as judge, pytest.raises(ImportError, match=r"trialist\[eval\]"):
        judge.verify("1", "1")
