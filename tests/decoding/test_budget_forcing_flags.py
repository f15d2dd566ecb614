from __future__ import annotations

import copy

import pytest

from trialist.decoding.budget_forcing.flags import ThinkFlags


def test_flags_are_neutral_by_default_and_strings_alone_ask_for_nothing(character_tokenizer):
    assert ThinkFlags().options(None, character_tokenizer, ["x"]) == ()
    assert ThinkFlags(think_text="Hmm", think_end=":").options(None, character_tokenizer, ["x"]) == ()


def test_a_model_without_such_a_token_thinks_from_the_start_and_closes_in_words(character_tokenizer):
    (option,) = ThinkFlags(think_budget=9, think_ignore=2, think_min=3, think_answer=4).options(
        None, character_tokenizer, ["x"]
    )
    assert (option.start_think, option.end_think, option.final_prefix) == (None, "Final Answer:", "")
    assert (option.max_thinking_tokens, option.num_ignore, option.min_thinking_tokens) == (9, 2, 3)
    assert option.max_answer_tokens == 4


def test_a_model_that_has_the_tokens_is_taken_at_them_and_named_ones_come_first(character_tokenizer):
    tokenizer = copy.deepcopy(character_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    (option,) = ThinkFlags(think_ignore=1).options(None, tokenizer, ["x"])
    assert (option.start_think, option.end_think) == ("<think>", "</think>")
    (option,) = ThinkFlags(think_ignore=1, think_start="", think_end=":").options(None, tokenizer, ["x"])
    assert (option.start_think, option.end_think) == (None, ":")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"think_budget": 0}, "--think-budget must be at least 1, not 0"),
        ({"think_answer": 0}, "--think-answer must be at least 1"),
        ({"think_ignore": -1}, "--think-ignore must be at least 0"),
        ({"think_budget": 3, "think_min": 4}, "--think-min 4 is more than --think-budget 3"),
    ],
)
def test_values_out_of_range_name_their_flag(flags, words):
    with pytest.raises(ValueError, match=words):
        ThinkFlags(**flags)
