from __future__ import annotations

import json

import pytest

from trialist.data.verifiers import last_number, load_verifier


def accepts(name: str, completion: str, answer: str) -> bool:
    return load_verifier(name).accepts(completion, answer)


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
        ("the answer is \u22123", "-3"),
        ("the answer is \u20133", "-3"),
        ("pages 5\u20137", "7"),
        ("9 \u2212 12", "12"),
        ("9 - 12 = - 3", "-3"),
        ("9 - 12 =\u22123", "-3"),
        ("\u0663", None),
        ("1.234.567", "1.234.567"),
        ("it is 1e5", "1e5"),
        ("no digits here", None),
        ("", None),
        ("...", None),
    ],
)
def test_the_last_signed_number_of_a_text(text, number):
    assert last_number(text) == number


def test_an_answer_is_compared_letter_for_letter_after_commas_are_gone():
    assert accepts("number", "So it is 1234.", load_verifier("number").read("1,234"))
    assert accepts("number", "So it is 1,234.", "1234")
    assert accepts("number", "-3", "-3")
    assert not accepts("number", "3", "-3")
    assert not accepts("number", "3.0", "3")


def test_a_completion_without_a_number_is_wrong_whatever_the_answer():
    assert not accepts("number", "I do not know", "0")
    assert not accepts("number", "", "0")


@pytest.mark.parametrize(
    ("given", "read"),
    [(72, "72"), (72.0, "72"), (1e16, "10000000000000000"), (1e-5, "0.00001"), (-0.5, "-0.5"), ("1e-05", "0.00001"),
     ("$1,024 ", "1024"), ("3.50", "3.50"), ("48/2 = 24\n#### 24", "24"), ("\u22123", "-3"), ("+7", "7")],
)  # fmt: skip
def test_the_number_of_an_answer_is_written_as_a_completion_would_write_it(given, read):
    assert load_verifier("number").read(given) == read


@pytest.mark.parametrize(
    ("given", "message"),
    [("5 apples of 7", "more than one number"), ("3/4", "more than one number"), ("many", "no number"),
     ("1.234.567", "no number"), ({"a": 3}, "is no number"), ([4], "is no number"), (True, "is no number"),
     (float("nan"), "is no number")],
)  # fmt: skip
def test_an_answer_that_is_not_one_number_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        load_verifier("number").read(given)


@pytest.mark.parametrize(
    ("given", "box"),
    [("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}"), ("$p - q$", "\\boxed{p - q}"), (3, "\\boxed{3}"),
     ("We get $x=1$, so \\boxed{\\frac{1}{2}} it is.", "\\boxed{\\frac{1}{2}}"), ("as $2+2$\n#### 4", "\\boxed{4}")],
)  # fmt: skip
def test_of_a_mathematical_answer_what_stands_in_its_box_counts(given, box):
    pytest.importorskip("math_verify", reason="the extra `eval` is not installed")
    assert load_verifier("math").read(given) == box


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [("so it is $0.5$", "\\frac{1}{2}", True), ("\\boxed{q - p}", "p - q", False), ("\\boxed{-q + p}", "p - q", True),
     ("no idea", "4", False)],
)  # fmt: skip
def test_equal_expressions_are_right_however_they_are_written(completion, answer, right):
    pytest.importorskip("math_verify", reason="the extra `eval` is not installed")
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    verifier = load_verifier("math")
    assert verifier.accepts(completion, verifier.read(answer)) == right


def test_mathematics_without_its_library_says_what_to_install(monkeypatch):
    load_verifier.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs math_verify: `pip install 'trialist\[eval\]'`"):
        load_verifier("math")


def test_a_function_of_ones_own_decides(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "def ends(completion, answer):\n    return completion.endswith(answer)\n\n\ndef share(*_):\n    return 0.5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert accepts("own_rules:ends", "well, yes", load_verifier("own_rules:ends").read("yes"))
    assert not accepts("own_rules:ends", "yes, well", "yes")
    with pytest.raises(ValueError, match=r"'own_rules:share' returned 0.5; it must answer True or False"):
        accepts("own_rules:share", "yes", "yes")


@pytest.mark.parametrize(
    ("name", "message"),
    [("numbers", "no verifier 'numbers'; there are number, math, ifeval, and module:function"),
     ("no_such_module:f", "there is no module 'no_such_module'; add its folder to PYTHONPATH"),
     ("json:no_such", "the module 'json' has no function 'no_such'")],
)  # fmt: skip
def test_verifiers_that_do_not_exist_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_verifier(name)


def test_all_constraints_of_an_answer_must_be_met():
    verifier = load_verifier("ifeval")
    names = ["punctuation:no_comma", "keywords:existence"]
    answer = verifier.read(json.dumps({"instruction_id_list": names, "kwargs": [{}, {"keywords": ["sun", "sea"]}]}))
    assert verifier.accepts("The Sun and the sea", answer)
    assert not verifier.accepts("The sun, the sea", answer)
    assert not verifier.accepts("The sunny sea", answer)
