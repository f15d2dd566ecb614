from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trialist.data.conversations import encode_rows
from trialist.data.formats import lead, read_rows
from trialist.data.tokenizers import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "\nünd"},
]


@pytest.fixture
def chat():
    """Bytes, with two tokens that begin and end turns; `\\n\\n` is one token, so a turn's first line break merges."""
    plain = byte_tokenizer()
    vocabulary = {token: index for token, index in plain.get_vocab().items() if index < 256}
    inner = Tokenizer(models.BPE(vocab={**vocabulary, "ĊĊ": 256}, merges=[("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def learnt(tokenizer, example) -> list[str]:
    """The runs of tokens that count, as text."""
    ids, labels = example["input_ids"], example["labels"]
    counts = np.concatenate([[False], labels != -100, [False]])
    starts, ends = np.flatnonzero(~counts[:-1] & counts[1:]), np.flatnonzero(counts[:-1] & ~counts[1:])
    assert np.array_equal(labels[labels != -100], ids[labels != -100])
    return [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends)]


def encode(tokenizer, *rows, columns=("messages",), length=500, **options):
    return encode_rows(rows, columns, tokenizer, length=length, **options)


def test_every_turn_of_the_assistant_counts_up_to_its_end(chat):
    (example,) = encode(chat, {"messages": TALK}).rows
    assert chat.decode(example["input_ids"]) == chat.apply_chat_template(TALK, tokenize=False)
    # the token of two line breaks spans the beginning of the second answer
    assert learnt(chat, example) == ["4<|im_end|>", "\n\nünd<|im_end|>"]


def test_the_marks_of_a_template_tell_the_same_tokens(chat):
    plain = [{**m, "content": m["content"].strip()} for m in TALK]
    by_prefixes = encode(chat, {"messages": plain}).rows[0]
    chat.chat_template = MARKED
    by_marks = encode(chat, {"messages": plain}).rows[0]
    for name in ("input_ids", "labels"):
        assert np.array_equal(by_marks[name], by_prefixes[name])
    assert learnt(chat, encode(chat, {"messages": plain}, train_on="last").rows[0]) == ["ünd<|im_end|>"]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("last", ["\n\nünd<|im_end|>"]), ("completions", ["4<|im_end|>", "\n\nünd<|im_end|>"])],
)
def test_the_turns_that_count_can_be_chosen(chat, train_on, expected):
    assert learnt(chat, encode(chat, {"messages": TALK}, train_on=train_on).rows[0]) == expected


def test_with_all_tokens_only_the_first_does_not_count(chat):
    (example,) = encode(chat, {"messages": TALK}, train_on="all").rows
    assert np.flatnonzero(example["labels"] == -100).tolist() == [0]


def test_of_a_conversational_prompt_no_answer_counts(chat):
    row = {"prompt": TALK[:4], "completion": TALK[4:]}
    (example,) = encode(chat, row, columns=("prompt", "completion")).rows
    assert chat.decode(example["input_ids"]) == chat.apply_chat_template(TALK, tokenize=False)
    assert learnt(chat, example) == ["\n\nünd<|im_end|>"]
    chat.chat_template = MARKED
    assert learnt(chat, encode(chat, row, columns=("prompt", "completion")).rows[0])[0].endswith("ünd<|im_end|>")


def test_strings_are_joined_and_end_in_the_end_token(chat):
    row = {"prompt": "2+2=", "completion": "4"}
    (example,) = encode(chat, row, columns=("prompt", "completion")).rows
    assert chat.decode(example["input_ids"]) == "2+2=4<|im_end|>"
    assert learnt(chat, example) == ["4<|im_end|>"]
    (talked,) = encode(chat, row, columns=("prompt", "completion"), chat=True).rows
    assert chat.decode(talked["input_ids"]).startswith("<|im_start|>user\n2+2=<|im_end|>")
    assert learnt(chat, talked) == ["4<|im_end|>"]


def test_a_token_across_the_end_of_the_prompt_counts_and_is_said(chat):
    examples = encode(chat, {"prompt": "a\n", "completion": "\nb"}, {"prompt": "a", "completion": "b"},
                      columns=("prompt", "completion"))  # fmt: skip
    assert learnt(chat, examples.rows[0]) == ["\n\nb<|im_end|>"]
    assert "in 1 of 2 rows a token spans the end of the prompt" in examples.notes[0]


def test_of_text_all_but_the_first_token_counts(chat):
    (example,) = encode(chat, {"text": "über"}, columns=("text",)).rows
    assert example["input_ids"].tolist() == [*"über".encode(), chat.eos_token_id]
    assert example["labels"].tolist() == [-100, *"über".encode()[1:], chat.eos_token_id]


class Slow:
    """The tokenizer without offsets."""

    def __init__(self, tokenizer):
        self.inner, self.is_fast = tokenizer, False

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, texts, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self.inner(texts, **options)


def test_a_tokenizer_without_offsets_tells_the_same_tokens(chat):
    fast, slow = (encode(tokenizer, {"messages": TALK}).rows[0] for tokenizer in (chat, Slow(chat)))
    assert np.array_equal(fast["labels"], slow["labels"])


def test_long_rows_are_cut_or_left_out_and_counted(chat):
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (3, 9, 20)]
    cut = encode(chat, *rows, columns=("prompt", "completion"), length=8)
    assert [len(row["input_ids"]) for row in cut.rows] == [6, 8, 8]
    assert learnt(chat, cut.rows[1]) == ["cccccc"]
    assert "2 of 3 rows are longer than 8 tokens: their end was cut off" in cut.notes
    dropped = encode(chat, *rows, columns=("prompt", "completion"), length=8, drop_long=True)
    assert dropped.numbers == (1,)
    assert "2 of 3 rows are longer than 8 tokens: left out" in dropped.notes


def test_an_answer_that_does_not_end_in_the_end_token_is_said(chat):
    chat.chat_template = CHATML.replace("<|im_end|>", "<end>")
    assert "does not end in the tokenizer's '<|im_end|>'" in encode(chat, {"messages": TALK}).notes[0]


BAD = {
    "empty completion": ({"prompt": "a", "completion": " "}, r"row 2: 'completion' is empty"),
    "number": ({"prompt": "a", "completion": 4}, r"row 2: 'prompt' is a string and 'completion' is a int"),
    "missing": ({"prompt": None, "completion": "b"}, r"row 2: 'prompt' is missing"),
    "too long": (
        {"prompt": "a" * 50, "completion": "b"},
        r"row 2 has 52 tokens.*first 40; raise --length.*--drop-long",
    ),
    "mixed": ({"prompt": TALK[:1], "completion": TALK[2:3]}, r"row 2: a conversation, while other rows are strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_of_prompt_and_completion_is_named(chat, name):
    row, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        encode(chat, {"prompt": "a", "completion": "b"}, row, columns=("prompt", "completion"), length=40)


BAD_MESSAGES = {
    "no list": ("hello", "'messages' must be a list of messages, not a string"),
    "no role": (
        [{"content": "a"}],
        r"message 1: expected {'role': ..., 'content': ...}, found an object with 'content'",
    ),
    "picture": ([{"role": "user", "content": [{"type": "image"}]}], "message 1: only text is learnt"),
    "no assistant": (TALK[:2], "no message of the assistant to learn from"),
    "empty answer": ([TALK[1], {"role": "assistant", "content": ""}], "'messages', message 2 is empty"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_broken_messages_are_named(chat, name):
    value, message = BAD_MESSAGES[name]
    with pytest.raises(ValueError, match=f"chat.jsonl row 2: .*{message}|chat.jsonl row 2: {message}"):
        encode(chat, {"messages": TALK}, {"messages": value}, source="chat.jsonl")


def test_messages_without_a_chat_template_are_an_error_in_words(chat):
    chat.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use an instruct model, pass --chat-template"):
        encode(chat, {"messages": TALK})


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_the_last_turn(chat):
    chat.chat_template = FORGETFUL
    with pytest.raises(ValueError, match=r"row 1: the chat template renders.*up to message 3.*--train-on last"):
        encode(chat, {"messages": TALK})
    assert learnt(chat, encode(chat, {"messages": TALK}, train_on="last").rows[0]) == ["\n\nünd<|im_end|>"]


def test_a_conversation_that_the_template_rejects_is_named(chat):
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"row 1: .*roles must alternate.*; roles are system, user"):
        encode(chat, {"messages": TALK})


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_tools_and_values_of_a_row_reach_the_template(chat, template):
    chat.chat_template = "{% for t in tools %}[{{ t['name'] }}]{% endfor %}{{ brief }}" + template
    row = {"messages": TALK[1:3], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"brief": "short"}}
    (example,) = encode(chat, row).rows
    assert chat.decode(example["input_ids"]).startswith("[f]short<|im_start|>user")
    assert learnt(chat, example) == ["4<|im_end|>"]
    with pytest.raises(ValueError, match="row 1: 'tools' is a string that is no JSON"):
        encode(chat, {**row, "tools": "f"})


def test_the_format_is_told_from_the_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": "a", "text": "t"}) + "\n" for i in range(3)))
    columns, rows = read_rows(str(path), columns={"prompt": "question", "completion": "answer"}, max_examples=2)
    assert columns == ("prompt", "completion")
    assert [row["prompt"] for row in rows] == ["q0", "q1"]
    assert read_rows(str(path))[0] == ("text",)
    path.write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match=r"expected the column 'messages', or 'prompt'.*found 'question'; name yours"):
        read_rows(str(path))
    path.write_text('{"text": "q"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_rows(str(path))
    (tmp_path / "notes.txt").write_text("some text")
    assert read_rows(str(tmp_path / "notes.txt")) == (("text",), [{"text": "some text"}])


def test_what_comes_before_the_first_answer_groups_rows():
    assert lead({"messages": TALK}, ("messages",)) == "be brief\n2+2?"
    assert lead({"prompt": TALK[:3], "completion": TALK[4:]}, ("prompt", "completion")) == "be brief\n2+2?\n4"
    assert lead({"prompt": "a", "completion": "b"}, ("prompt", "completion")) == "a"
