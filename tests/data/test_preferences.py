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


DIALOGUE = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    "prompt", [[user("p")], [{"role": "system", "content": "s"}, user("p")]], ids=["user", "system"]
)
def test_a_prompt_of_messages_that_both_answers_repeat_is_taken_off_them(prompt: list[dict[str, str]]) -> None:
    [row] = read_preferences(
        [{"prompt": prompt, "chosen": [*prompt, assistant("c")], "rejected": [*prompt, assistant("r")]}]
    )
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, [assistant("c")], [assistant("r")])


@pytest.mark.parametrize("prompt", ["hi", DIALOGUE], ids=["the question", "the dialogue"])
def test_a_prompt_that_whole_dialogues_repeat_is_taken_off_them(prompt: str) -> None:
    [row] = read_preferences([{"prompt": prompt, "chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b"}])
    assert (row["prompt"], row["chosen"], row["rejected"]) == (DIALOGUE, " a", " b")


def test_a_prompt_that_dialogues_do_not_hold_stays() -> None:
    given = {"prompt": "Be brief.", "chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b"}
    assert read_preferences([given]) == [given]


def test_all_blank_answers_are_counted_in_one_error() -> None:
    rows = [GOOD, {**GOOD, "chosen": " "}, GOOD, {"chosen": DIALOGUE, "rejected": f"{DIALOGUE} yo"}]
    with pytest.raises(
        ValueError, match=r"data row 2: 'chosen' is empty behind the prompt, and 1 more in the data; drop"
    ):
        read_preferences(rows)


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
        ({**GOOD, "rejected": " \n"}, r"2: 'rejected' is empty"),
        ({"chosen": "sky is blue", "rejected": "sky is blue and red"}, r"2: 'chosen' is empty behind the prompt"),
        ({"chosen": f"{DIALOGUE} yo", "rejected": f"{DIALOGUE} "}, r"2: 'rejected' is empty behind the prompt"),
        ({**GOOD, "chosen": [], "rejected": []}, r"2: 'chosen' must be a string or a list of messages"),
        ({**TALK, "chosen": TALK["rejected"]}, r"2: 'chosen' equals 'rejected'"),
        ({**TALK, "prompt": "other"}, r"2: 'prompt' is a string, its answers are lists"),
        ({**TALK, "prompt": None}, r"2 has no 'prompt'"),
        ({**TALK, "rejected": [assistant(" ")]}, r"2: 'rejected', message 1 is empty"),
        ({**TALK, "rejected": [user("r")]}, r"2: 'rejected' does not end with a message of the assistant"),
        ({**TALK, "chosen": [user("p"), assistant("c")]}, r"2: 'chosen' begins with the messages of 'prompt', 'rejected'"),
        ({**TALK, "rejected": [user("p"), assistant("c")]}, r"2: 'rejected' begins with .*, 'chosen' does not"),
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


TOOLS = "{% if tools %}{% for t in tools %}[{{ t['name'] }}]{% endfor %}{% endif %}"


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'], ids=["list", "JSON"])
def test_tools_reach_the_template_as_a_list_or_as_its_json(tools: Any) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TOOLS + CHATML
    [pair], _ = encode_preferences(read_preferences([{**TALK, "tools": tools}]), tokenizer, max_length=90)
    assert tokenizer.decode(pair.prompt) == "[f]<|user|>p<eos>\n<|assistant|>"


def test_values_for_the_template_reach_it() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% if brief is defined %}{{ brief }}{% endif %}" + CHATML
    rows = [{**TALK, "chat_template_kwargs": {"brief": "be brief"}}, {**TALK, "chat_template_kwargs": {"brief": None}}]
    pairs, _ = encode_preferences(read_preferences(rows), tokenizer, max_length=90)
    assert [tokenizer.decode(pair.prompt).partition("<")[0] for pair in pairs] == ["be brief", ""]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tools": "[{"}, "prefs row 2: 'tools' is a string that is no JSON"),
        ({"tools": [7]}, "prefs row 2: the chat template does not take this conversation .*roles are user"),
        ({"chat_template_kwargs": "x"}, "prefs row 2: 'chat_template_kwargs' must be an object, not a string"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "prefs row 2: the chat template does not take this conversation",
        ),
    ],
)
def test_what_the_template_cannot_take_is_named_with_its_row(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode_preferences(
            read_preferences([TALK, {**TALK, **columns}]), chat_tokenizer(), max_length=90, source="prefs"
        )


def test_tokens_that_the_template_writes_into_an_answer_count_and_are_said() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHATML.replace("|>{{ m", "|>{% if m['role'] == 'assistant' %}--{% endif %}{{ m")
    [pair], counts = encode_preferences(read_preferences([TALK]), tokenizer, max_length=90)
    assert pair.chosen == [*b"--c", END]
    assert (counts["opened"], counts["turns"]) == (1, 0)
    assert "in 1 of 1 rows the chat template writes into the answer" in notes(counts, 90)[0]


def test_turns_of_the_user_within_an_answer_count_and_are_said() -> None:
    row = {**TALK, "chosen": [assistant("c"), user("?"), assistant("d")]}
    [pair], counts = encode_preferences(read_preferences([row]), chat_tokenizer(), max_length=90)
    assert bytes(token for token in pair.chosen if token < 256) == b"c\n<|user|>?\n<|assistant|>d"
    assert (counts["opened"], counts["turns"]) == (0, 1)
    assert "in 1 of 1 rows an answer has several turns" in notes(counts, 90)[0]


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
    with pytest.raises(ValueError, match=r"data row 1: the chat template does not take this conversation \(no\)"):
        encode_preferences(read_preferences([TALK]), tokenizer, max_length=9)


def test_strings_become_turns_where_they_are_to_be_a_conversation():
    rows = [{"prompt": "1?", "chosen": "yes", "rejected": "no", "label_prob": 0.5}]
    wanted = {
        "prompt": [{"role": "user", "content": "1?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "label_prob": 0.5,
    }
    assert read_preferences(rows, chat=True) == [wanted]
    assert read_preferences([wanted], chat=True) == [wanted]
