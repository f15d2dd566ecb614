"""Preference rows: what is refused, and what becomes of prompts and answers as tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from trialist.data.preferences import PreferencePair, encode_preferences, notes, read_preferences
from trialist.data.tokenizers import bpe_tokenizer, byte_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = 257


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "prefs.jsonl") -> str:
    file = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(file)


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = CHATML
    return tokenizer


# reading


def test_rows_of_a_file_keep_their_order_and_other_columns(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": "r", "score": n} for n in range(3)]
    assert read_preferences(written(tmp_path, rows, "prefs.jsonl.gz"), max_examples=2) == rows[:2]
    assert read_preferences(rows) == rows


def test_columns_take_other_names() -> None:
    found = read_preferences([{"q": "p", "good": "c", "bad": "r"}], columns="prompt=q,chosen=good,rejected=bad")
    assert found == [{"prompt": "p", "chosen": "c", "rejected": "r"}]


def test_a_dialogue_string_is_split_behind_the_last_common_assistant_mark() -> None:
    start = "\n\nHuman: hi\n\nAssistant: Hello\n\nHuman: a pen?\n\nAssistant:"
    [row] = read_preferences([{"chosen": start + " I will not", "rejected": start + " I will"}])
    assert (row["prompt"], row["chosen"], row["rejected"]) == (start, " I will not", " I will")


def test_another_string_is_split_where_the_answers_part() -> None:
    [row] = read_preferences([{"chosen": "sky is blue", "rejected": "sky is green"}])
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("sky is", " blue", " green")


@pytest.mark.parametrize("prompt", [None, "sky?"])
def test_messages_that_both_answers_begin_with_become_the_prompt(prompt: str | None) -> None:
    row = {"prompt": prompt, "chosen": [user("sky?"), assistant("blue")], "rejected": [user("sky?"), assistant("red")]}
    [found] = read_preferences([row])
    assert (found["prompt"], found["chosen"], found["rejected"]) == (
        [user("sky?")],
        [assistant("blue")],
        [assistant("red")],
    )


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
TALK = {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "p", "chosen": "c"}, r"2.*'rejected' is missing"),
        ({"prompt": "p", "rejected": "r"}, r"2.*'chosen' is missing"),
        (TALK, r"2 holds conversations, while the rows before hold strings"),
        ({**GOOD, "chosen": [assistant("c")]}, r"2: 'chosen' is a list of messages and 'rejected' is a string"),
        ({**GOOD, "prompt": [user("p")]}, r"2: 'prompt' is a list of messages, its answers are strings"),
        ({**GOOD, "chosen": "r"}, r"2: 'chosen' equals 'rejected'"),
        ({**GOOD, "chosen": ""}, r"2: 'chosen' is empty"),
        ({**GOOD, "chosen": [], "rejected": []}, r"2: 'chosen' must be a string or a list of messages"),
        ({**TALK, "chosen": TALK["rejected"]}, r"2: 'chosen' equals 'rejected'"),
        ({**TALK, "prompt": "other"}, r"2: 'prompt' is a string, its answers are lists"),
        ({**TALK, "prompt": None}, r"2 has no 'prompt'"),
        ({**TALK, "rejected": [assistant(" ")]}, r"2: 'rejected', message 1 is empty"),
        ({**TALK, "rejected": [user("r")]}, r"2: 'rejected' does not end with a message of the assistant"),
        ({**TALK, "rejected": [{"content": "r"}]}, r"2: 'rejected', message 1: expected \{'role'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["file", "rows"])
def test_a_bad_row_is_named_with_its_place(tmp_path: Path, bad: dict[str, Any], words: str, kind: str) -> None:
    rows = [GOOD, bad]
    with pytest.raises(ValueError, match=("line " if kind == "file" else "data row ") + words):
        read_preferences(written(tmp_path, rows) if kind == "file" else rows)


def test_a_column_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the column 'rejected', found 'prompt', 'chosen'"):
        read_preferences(written(tmp_path, [{"prompt": "p", "chosen": "c"}]))


# tokens


def test_answers_are_ended_and_prompts_are_not() -> None:
    pairs, counts = encode_preferences([GOOD], byte_tokenizer(), max_length=9)
    assert pairs == [PreferencePair([ord("p")], [ord("c"), END], [ord("r"), END], 0)]
    assert counts["pairs"] == counts["rows"] == 1
    assert notes(counts, 9) == ()


def test_a_token_that_spans_the_end_of_the_prompt_counts_as_answer() -> None:
    tokenizer = bpe_tokenizer(["the cat the cat the cat"] * 20, 280, cache=False)
    row = {"prompt": "the c", "chosen": "at", "rejected": "ow"}
    [pair], counts = encode_preferences([row], tokenizer, max_length=20)
    for answer, text in ((pair.chosen, "the cat"), (pair.rejected, "the cow")):
        assert [*pair.prompt, *answer] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(pair.prompt) == "the"
    assert counts["merged"] == 1


def test_conversations_go_through_the_chat_template_and_end_with_their_turn() -> None:
    [pair], counts = encode_preferences(read_preferences([TALK]), chat_tokenizer(), max_length=90)
    tokenizer = chat_tokenizer()
    assert tokenizer.decode(pair.prompt) == "<|user|>p<eos>\n<|assistant|>"
    assert (pair.chosen, pair.rejected) == ([ord("c"), END], [ord("r"), END])
    assert counts["endless"] == 0


def test_long_answers_lose_their_end_and_rows_without_room_or_difference_are_left_out() -> None:
    rows = [
        {"prompt": "pp", "chosen": "abcdef", "rejected": "b"},
        {"prompt": "pppp", "chosen": "a", "rejected": "b"},  # fills the length
        {"prompt": "p", "chosen": "abcx", "rejected": "abcy"},  # alike up to the length
    ]
    pairs, counts = encode_preferences(rows, byte_tokenizer(), max_length=4)
    assert [(pair.row, bytes(pair.chosen), pair.rejected) for pair in pairs] == [(0, b"ab", [ord("b"), END])]
    assert (counts["cut"], counts["long_prompts"], counts["equal"]) == (1, 1, 1)
    assert len(notes(counts, 4)) == 3


def test_a_prompt_longer_than_the_context_is_an_error_that_names_the_row() -> None:
    rows = [GOOD, {**GOOD, "prompt": "p" * 8}]
    with pytest.raises(ValueError, match="prefs row 2: its prompt has 8 tokens and the model takes 7"):
        encode_preferences(rows, byte_tokenizer(), max_length=4, context=7, source="prefs")
    with pytest.raises(ValueError, match="no pair is left of 1 rows: 1 prompts fill 4 tokens"):
        encode_preferences(rows[1:], byte_tokenizer(), max_length=4)


def test_an_empty_prompt_becomes_the_token_that_texts_begin_with() -> None:
    [pair], _ = encode_preferences([{**GOOD, "prompt": ""}], byte_tokenizer(), max_length=9)
    assert (pair.prompt, pair.chosen) == ([256], [ord("c"), END])


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        encode_preferences(read_preferences([TALK]), byte_tokenizer(), max_length=9)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="data row 1: the chat template does not take"):
        encode_preferences(read_preferences([TALK]), tokenizer, max_length=9)
