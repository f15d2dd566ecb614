from __future__ import annotations

import pytest

from trialist.data.constraints import CHECKS, meets, read_constraints


def given(name, **keywords):
    return {"instruction_id_list": [name], "kwargs": [keywords]}


CASES = {
    "keywords:existence": ({"keywords": ["sun"]}, "The SUN.", "Sunny."),
    "keywords:forbidden_words": ({"forbidden_words": ["sun"]}, "Sunny.", "The sun."),
    "keywords:frequency": ({"keyword": "a", "frequency": 2, "relation": "less than"}, "a b", "a b A"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one, two three", "one two"),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "at least"}, "So. It is!", "So it is..."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [place]", "[name]"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two", "* one\n**two**"),
    "detectable_format:title": ({}, "<<a title>> text", "<< >> text"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "a: 1"),
    "change_case:english_lowercase": ({}, "all low, 1", "Not"),
    "change_case:english_capital": ({}, "ALL UP, 1", "UPp"),
    "startend:end_checker": ({"end_phrase": "the end."}, "It is The end. ", "the end is near"),
    "startend:quotation": ({}, '"so"', '"'),
    "punctuation:no_comma": ({}, "so", "so, so"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_constraint_tells_a_text_that_meets_it_from_one_that_does_not(name):
    keywords, right, wrong = CASES[name]
    constraints = read_constraints(given(name, **keywords, unused=None))
    assert meets(right, constraints)
    assert not meets(wrong, constraints)
    assert not meets(" ", constraints)


def test_numbers_that_a_table_made_floats_are_whole_again():
    assert read_constraints(given("length_constraints:number_paragraphs", num_paragraphs=2.0)) == [
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2})
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("no json", "names no constraints; wanted is"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "names no constraints"),
        (given("language:response_language", language="de"), "no constraint 'language:response_language'; there are"),
        (given("keywords:existence", keywords=["sun", 3]), r"needs 'keywords' \(list\), and has \['sun', 3\]"),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": ["sun"]},
            r"needs 'keywords' \(list\), and has None",
        ),
        (given("keywords:existence"), r"needs 'keywords' \(list\), and has None"),
        (
            given("keywords:frequency", keyword="a", frequency=2, relation="more"),
            "'relation' is one of less than, at least",
        ),
    ],
)
def test_constraints_that_cannot_be_checked_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        read_constraints(answer)
