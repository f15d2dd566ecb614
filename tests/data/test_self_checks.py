from __future__ import annotations

import dataclasses
import random
import re

import pytest

from trialist.data.self_checks import (
    CHARACTERS,
    END,
    EOS,
    LETTERS,
    UNTRAINED,
    WAIT,
    Question,
    SelfCheckBatches,
    SelfChecks,
    answer_of,
    character_tokenizer,
    encode,
    lines,
    questions,
)  # fmt: skip


def test_lines_are_running_sums_and_an_error_goes_on():
    assert lines(Question((7, 5, 9, 4))) == "b5=2;c9=1;d4=5;"
    assert lines(Question((7, 5, 9, 4)), wrong=1, by=2) == "b5=2;c9=3;d4=7;"
    assert Question((7, 5, 9, 4)).text == "a7b5c9d4?"
    assert Question((7, 5, 9, 4)).answer == "5"


def checked(trace: str, question: Question) -> list[bool]:
    """Whether each pass over the sums is right, read from the text alone."""
    found = []
    for part in trace.split(WAIT):
        total, right = question.terms[0], True
        steps = re.findall(r"([b-t])(\d)=(\d);", part)
        assert "".join(f"{name}{term}={result};" for name, term, result in steps) == part
        for term, (_, given, result) in zip(question.terms[1:], steps, strict=True):
            total = (total + term) % question.modulus
            right &= int(given) == term and int(result) == total
        found.append(right)
    return found


def test_the_shares_of_errors_and_confirmations_are_those_asked_for_and_every_trace_ends_right():
    task, draw = SelfChecks(modulus=7, planted=0.3, confirmed=0.1), random.Random(0)
    kinds = {(True,): 0, (False, True): 0, (True, True): 0}
    for _ in range(3000):
        question = task.question(draw)
        kinds[tuple(checked(task.trace(question, draw), question))] += 1
    assert kinds[False, True] / 3000 == pytest.approx(0.3, abs=0.035)
    assert kinds[True, True] / 3000 == pytest.approx(0.1, abs=0.025)


def test_a_row_tells_the_length_of_its_trace_and_never_the_untrained_string():
    task, draw = SelfChecks(named=1.0), random.Random(1)
    for _ in range(200):
        given, learnt = task.row(task.question(draw), draw)
        trace = learnt.partition(END)[0]
        assert LETTERS.index(given[0]) == (len(trace) - 1) // 16
        assert UNTRAINED not in learnt
        assert len(given) + len(learnt) + 2 <= task.longest  # the beginning and the end


def test_batches_are_functions_of_their_step_and_only_what_is_learnt_has_labels():
    batches = SelfCheckBatches(SelfChecks(), 5, 3)
    one, again, other = batches(4), batches(4), batches(5)
    assert one["input_ids"].equal(again["input_ids"])
    assert one["input_ids"].shape != other["input_ids"].shape or not one["input_ids"].equal(other["input_ids"])
    ask = encode("?")[0]
    for ids, labels in zip(one["input_ids"].tolist(), one["labels"].tolist(), strict=True):
        start, end = ids.index(ask) + 1, ids.index(EOS) + 1
        assert labels == [-100] * start + ids[start:end] + [-100] * (len(ids) - end)


def test_questions_differ_and_have_every_length():
    found = questions(SelfChecks(fewest=2, most=5), 90, 7)
    assert len(set(found)) == 90
    assert {len(question.terms) for question in found} == {2, 3, 4, 5}
    assert found == questions(SelfChecks(fewest=2, most=5), 90, 7)


def test_the_tokenizer_has_a_token_for_each_character():
    tokenizer = character_tokenizer()
    assert tokenizer.encode(CHARACTERS, add_special_tokens=False) == encode(CHARACTERS)
    assert tokenizer.decode(encode("a7?b5=2;W#3")) == "a7?b5=2;W#3"
    assert tokenizer("a7?")["input_ids"][0] == tokenizer.bos_token_id


def test_the_answer_stands_behind_the_end():
    assert answer_of("b5=2;#2") == "2"
    assert answer_of("b5=2;") is None
    assert answer_of("b5=2;#") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"fewest": 1},
        {"modulus": 11},
        {"most": 3},
        {"most": 30},
        {"planted": 0.8, "confirmed": 0.3},
        {"letter_tokens": 4},
    ],
)
def test_what_no_trace_can_be_is_refused(changes):
    with pytest.raises(
        ValueError, match=next(iter(changes)) if "planted" in changes or "most" in changes else "most|fewest|modulus"
    ):
        dataclasses.replace(SelfChecks(), **changes).check()


def test_more_questions_than_there_are_are_refused():
    assert len(questions(SelfChecks(fewest=2, most=3, modulus=3), 18, 1)) == 18
    with pytest.raises(ValueError, match=r"20 questions .* 10 of them with 2, and there are 9 such sums"):
        questions(SelfChecks(fewest=2, most=3, modulus=3), 20, 1)
