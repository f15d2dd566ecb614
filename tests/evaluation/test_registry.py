from __future__ import annotations

import pytest

from trialist.evaluation.blimp import Blimp
from trialist.evaluation.harness import Harness
from trialist.evaluation.registry import evaluation_names, load_evaluation, options_for, settle_name
from trialist.evaluation.text import Text


def test_a_name_stands_for_its_evaluation_and_options():
    assert load_evaluation("arc_easy", {"shots": 3, "limit": None}) == Harness("arc_easy", shots=3)
    assert load_evaluation("lm-eval:arc_easy") == Harness("arc_easy")
    assert load_evaluation("text:notes.txt", {"length": 9}) == Text("notes.txt", length=9)
    assert load_evaluation("blimp") == Blimp()
    assert settle_name("mmlu_anatomy") == ("lm-eval", "mmlu_anatomy")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hellaswga", {}, "Did you mean 'hellaswag'"),
        ("lm-eval:arc_esy", {}, "Did you mean 'arc_easy'"),
        ("zzzzzzzz", {}, "There is text, blimp, hellaswag"),
        ("text:", {}, "name the data behind the colon"),
        ("text", {}, "which text"),
        ("text:a", {"data": "b"}, "names its data already"),
        ("hellaswag", {"data": "b"}, "--data does not go with 'hellaswag': it brings its own data"),
        ("text:a", {"shots": 1}, "--shots does not go with 'text:a'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_evaluation(name, options)


def test_options_given_for_several_names_go_to_those_that_take_them():
    found = options_for(["hellaswag", "blimp", "text:b"], {"data": "a", "limit": 3, "shots": 0})
    assert found == {"hellaswag": {"limit": 3, "shots": 0}, "blimp": {"data": "a", "limit": 3}, "text:b": {"limit": 3}}
    assert options_for(["hellaswag"], {"data": "a"}) == {"hellaswag": {"data": "a"}}


def test_every_listed_name_has_one_line_and_is_known():
    for name, about in evaluation_names().items():
        assert settle_name(name)
        assert about
        assert "\n" not in about
