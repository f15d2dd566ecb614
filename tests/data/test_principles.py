"""Instructions taken apart into a request and the principle that constrains its answer."""

from __future__ import annotations

import json

import pytest

from trialist.data.principles import MARKERS, read_principles, taken_apart

COMMA, CAPITAL = ["punctuation:no_comma"], ["change_case:english_capital"]
ROWS = [
    {"prompt": "Write a poem. It is for kids.\nDo not use any commas.", "instruction_id_list": COMMA, "kwargs": [{}]},
    {"prompt": "Write a poem without commas.", "instruction_id_list": COMMA, "kwargs": [{}]},
    {"prompt": "Two things. No commas, please.", "instruction_id_list": COMMA + CAPITAL, "kwargs": [{}, {}]},
    {
        "prompt": "Say hi. Speak Punjabi.",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "pa"}],
    },
    {"prompt": "Say hello.", "principle": "Be loud.", "key": 9, "instruction_id_list": CAPITAL, "kwargs": [{}]},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def test_the_sentences_that_state_a_constraint_are_the_principle(file):
    first, last = read_principles(file)
    assert (first.request, first.principle) == ("Write a poem. It is for kids.", "Do not use any commas.")
    assert (last.key, last.request, last.principle) == ("9", "Say hello.", "Be loud.")
    assert last.constraints == (("change_case:english_capital", {}),)


@pytest.mark.parametrize(
    ("instruction", "constraint", "wanted"),
    [
        ('Write "Hi. You." Your title goes in <<>>. Use a title.', "detectable_format:title",
         ('Write "Hi. You."', "Your title goes in <<>>. Use a title.")),
        ("Give a JSON. Be nice.", "detectable_format:json_format", None),
        ("Write. Use JSON. Be nice.", "detectable_format:json_format", None),
        ("Write a text of 30 words.", "length_constraints:number_words", None),
    ],
    ids=["quoted", "stated first", "more behind it", "one sentence"],
)  # fmt: skip
def test_only_what_stands_apart_behind_the_request_is_taken(instruction, constraint, wanted):
    assert taken_apart(instruction, constraint) == wanted


def test_the_number_of_requests_can_be_bounded_and_none_is_an_error(file, tmp_path):
    assert len(read_principles(file, max_examples=1)) == 1
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({**ROWS[4], "instruction_id_list": ["change_case:wavy"]}))
    with pytest.raises(ValueError, match="row 1: no constraint 'change_case:wavy'"):
        read_principles(str(broken))
    path = tmp_path / "none.jsonl"
    path.write_text(json.dumps(ROWS[3]))
    with pytest.raises(ValueError, match="no row with one constraint"):
        read_principles(str(path))


def test_every_constraint_that_can_be_stated_can_be_checked():
    from trialist.data.constraints import CHECKS

    assert MARKERS.keys() == CHECKS.keys()
