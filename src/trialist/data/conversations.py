"""Rows of messages, of prompt and completion, or of text, as token ids with labels: what a model is taught by example.

Conversations are rendered by the tokenizer's chat template. Which tokens an assistant wrote
comes from the template's own `{% generation %}` marks, else from rendering the conversation up to before and after each of
its turns: both must be prefixes of the whole. A token counts if any of its characters was written by the assistant, up to
the token that ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trialist.data.chat import Message, checked_messages, kind, render
from trialist.data.formats import Row
from trialist.data.packing import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("completions", "last", "all")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHUNK = 1000
"""Rows tokenized at a time"""


@dataclass(frozen=True)
class Examples:
    """Token ids and labels, -100 where the prediction of a token does not count."""

    rows: list[dict[str, np.ndarray]]
    """`input_ids` and `labels`, int64 of equal length"""
    numbers: tuple[int, ...]
    """For each example the number of its row in the data, from 1"""
    notes: tuple[str, ...] = ()
    """What was cut, left out or otherwise worth knowing"""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Iterable[int]) -> Examples:
        chosen = list(indices)
        return Examples([self.rows[i] for i in chosen], tuple(self.numbers[i] for i in chosen), self.notes)

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def counted(self) -> int:
        return sum(int((row["labels"] != IGNORED).sum()) for row in self.rows)


def encode_rows(
    rows: Sequence[Row],
    columns: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    train_on: str = "completions",
    chat: bool = False,
    drop_long: bool = False,
    source: str = "data",
) -> Examples:
    """Token ids and labels of `rows`.

    length: longer rows lose their end, or with `drop_long` are left out; both are counted in the notes.
    train_on: `completions` (completions, and all turns of the assistant), `last` (its last turn) or `all` tokens.
    chat: string prompts and completions become a turn of the user and one of the assistant.
    source: what errors call the data.
    Raises ValueError that names the row: without something to learn, with an empty completion or broken messages, longer
    than `length` before the completion begins, not accepted or not rendered consistently by the chat template; and for
    messages without a chat template.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, not {train_on!r}")
    encoder = _Encoder(tokenizer, columns, train_on, chat, source)
    numbers = range(1, len(rows) + 1)
    examples: list[dict[str, np.ndarray]] = []
    kept: list[int] = []
    cut = dropped = 0
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        for number, (ids, counts) in zip(numbers[part], encoder(rows[part], numbers[part]), strict=True):
            counts[:1] = False  # nothing predicts the first token
            if not counts.any():
                raise ValueError(f"{source} row {number}: no token counts; is its completion empty?")
            if len(ids) > length:
                if drop_long:
                    dropped += 1
                    continue
                if not counts[:length].any():
                    raise ValueError(
                        f"{source} row {number} has {len(ids):,} tokens, and nothing of its completion is within the first "
                        f"{length:,}; raise --length, or leave such rows out with --drop-long"
                    )
                cut += 1
            ids, counts = ids[:length], counts[:length]
            examples.append({"input_ids": ids, "labels": np.where(counts, ids, IGNORED)})
            kept.append(number)
    if not examples:
        raise ValueError(f"{source}: all {len(rows):,} rows are longer than {length:,} tokens; raise --length")
    notes = list(encoder.notes())
    if cut:
        notes.append(f"{cut:,} of {len(rows):,} rows are longer than {length:,} tokens: their end was cut off")
    if dropped:
        notes.append(f"{dropped:,} of {len(rows):,} rows are longer than {length:,} tokens: left out")
    return Examples(examples, tuple(kept), tuple(notes))


@dataclass
class _Rendered:
    text: str
    spans: list[tuple[int, int]]
    """Characters that count"""
    number: int
    prompt: str | None = None


@dataclass
class _Encoder:
    """Renders and tokenizes rows, and remembers what is worth a note."""

    tokenizer: Any
    columns: tuple[str, ...]
    train_on: str
    chat: bool
    source: str
    merged: int = 0
    seen: int = 0
    endless: int = 0
    template: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.template = self.tokenizer.chat_template and str(self.tokenizer.get_chat_template())

    def notes(self) -> Iterable[str]:
        if self.merged:
            yield (
                f"in {self.merged:,} of {self.seen:,} rows a token spans the end of the prompt and counts as completion "
                "(a prompt that ends in a space?)"
            )
        if self.endless:
            yield (
                f"in {self.endless:,} of {self.seen:,} rows the assistant's last turn does not end in the tokenizer's "
                f"{self.tokenizer.eos_token!r}: generation may not stop by itself"
            )

    def __call__(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(T,) token ids and (T,) which of them count, for each row."""
        self.seen += len(rows)
        conversations = [self._conversation(row, number) for row, number in zip(rows, numbers, strict=True)]
        talks = [(*talk, row, number) for talk, row, number in zip(conversations, rows, numbers) if talk is not None]
        if not talks:
            return self._tokenize([self._strings(row, n) for row, n in zip(rows, numbers, strict=True)], special=True)
        if len(talks) < len(rows):
            raise ValueError(
                f"{self.source} row {talks[0][-1]}: a conversation, while other rows are strings; give one kind"
            )
        if self.template is None:
            raise ValueError(
                f"{self.source} has conversations, and the tokenizer has no chat template; use an instruct model, pass "
                "--chat-template FILE, or give prompt and completion as strings"
            )
        if GENERATION_MARK.search(self.template) and self.train_on != "all":
            return [self._by_marks(*talk) for talk in talks]
        return self._tokenize([self._by_prefixes(*talk) for talk in talks], special=False)

    # from a row to a conversation

    def _conversation(self, row: Row, number: int) -> tuple[list[Message], int] | None:
        """Messages, and the index from which the assistant's turns count; None for a row of strings."""
        if self.columns == ("messages",):
            messages = self._messages(row["messages"], "messages", number)
            first = 0
        elif self.columns == ("prompt", "completion"):
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                if not self.chat:
                    return None
                self._not_empty(completion, "completion", number)
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                first = 1
            elif isinstance(prompt, str) or isinstance(completion, str) or prompt is None or completion is None:
                raise ValueError(
                    f"{self.source} row {number}: 'prompt' is {kind(prompt)} and 'completion' is {kind(completion)}; "
                    "give two strings or two lists of messages"
                )
            else:
                asked = self._messages(prompt, "prompt", number)
                messages = asked + self._messages(completion, "completion", number)
                first = len(asked)
        else:
            return None
        if not any(message["role"] == "assistant" for message in messages[first:]):
            raise ValueError(f"{self.source} row {number}: no message of the assistant to learn from; drop the row")
        return messages, first

    def _messages(self, value: Any, column: str, number: int) -> list[Message]:
        return checked_messages(value, f"{self.source} row {number}: {column!r}")

    def _not_empty(self, text: str, column: str, number: int) -> None:
        if not text.strip():
            raise ValueError(f"{self.source} row {number}: {column!r} is empty; drop the row or fill it in")

    # from a conversation to characters that count

    def _by_prefixes(self, messages: list[Message], first: int, row: Row, number: int) -> _Rendered:
        whole = self._render(messages, False, row, number)
        if self.train_on == "all":
            return _Rendered(whole, [(0, len(whole))], number)
        spans = []
        for index in self._turns(messages, first):
            before = self._render(messages[:index], True, row, number) if index else ""
            last = index + 1 == len(messages)
            after = whole if last else self._render(messages[: index + 1], False, row, number)
            if not (whole.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"{self.source} row {number}: the chat template renders the conversation up to message {index + 1} "
                    "otherwise than as a part of the whole, so the assistant's tokens cannot be told; pass --train-on last "
                    "(its last turn) or all, or a template with {% generation %} marks"
                )
            spans.append((len(before), len(after)))
        return _Rendered(whole, spans, number)

    def _by_marks(self, messages: list[Message], first: int, row: Row, number: int) -> tuple[np.ndarray, np.ndarray]:
        place = f"{self.source} row {number}"
        encoded = render(
            self.tokenizer, messages, row, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = np.asarray(encoded["input_ids"], np.int64)
        counts = np.asarray(encoded["assistant_masks"], bool)
        self.endless += not (ids[counts] == self.tokenizer.eos_token_id).any()
        starts = np.flatnonzero(counts & ~np.concatenate([[False], counts[:-1]]))
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = self._turns(messages, first)
        if len(wanted) < len(turns):  # turns that do not count: those before, with `last` all but the last
            if len(starts) != len(turns):
                raise ValueError(
                    f"{self.source} row {number}: the chat template marks {len(starts)} turns of the assistant and there are "
                    f"{len(turns)}; pass --train-on all"
                )
            counts[: starts[turns.index(wanted[0])]] = False
        return ids, counts

    def _turns(self, messages: list[Message], first: int) -> list[int]:
        turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
        return turns[-1:] if self.train_on == "last" else turns

    def _render(self, messages: list[Message], generation_prompt: bool, row: Row, number: int) -> str:
        place = f"{self.source} row {number}"
        return render(self.tokenizer, messages, row, place, tokenize=False, add_generation_prompt=generation_prompt)

    # strings

    def _strings(self, row: Row, number: int) -> _Rendered:
        if self.columns == ("text",):
            text = row["text"]
            if not isinstance(text, str):
                raise ValueError(f"{self.source} row {number}: 'text' must be a string, not {kind(text)}")
            self._not_empty(text, "text", number)
            return _Rendered(text, [(0, len(text))], number)
        prompt, completion = row["prompt"], row["completion"]
        self._not_empty(completion, "completion", number)
        whole = prompt + completion
        return _Rendered(whole, [(0 if self.train_on == "all" else len(prompt), len(whole))], number, prompt)

    # from characters to tokens

    def _tokenize(self, rendered: list[_Rendered], *, special: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """special: the tokenizer adds its own special tokens, and each row ends with its end-of-sequence token."""
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        texts = [row.text for row in rendered]
        fast = bool(self.tokenizer.is_fast)
        encoded = self.tokenizer(texts, return_offsets_mapping=fast, **options)
        prompts = [row.prompt or "" for row in rendered]
        alone = self.tokenizer(prompts, **options)["input_ids"] if any(prompts) else [[]] * len(rendered)
        end = self.tokenizer.eos_token_id
        results = []
        for place, row in enumerate(rendered):
            ids = np.asarray(encoded["input_ids"][place], np.int64)
            counts = np.zeros(len(ids), bool)
            ends: Any = ()
            for span in row.spans:
                if fast:
                    offsets = np.asarray(encoded["offset_mapping"][place]).reshape(-1, 2)
                    inside = (offsets[:, 1] > span[0]) & (offsets[:, 0] < span[1]) & (offsets[:, 1] > offsets[:, 0])
                else:
                    first, last = (self._shared(row.text[:point], ids, options) for point in span)
                    inside = (np.arange(len(ids)) >= first) & (np.arange(len(ids)) < last)
                ends = np.flatnonzero(inside & (ids == end)) if end is not None else ()
                if not special and len(ends) and self.train_on != "all":
                    inside[ends[-1] + 1 :] = False  # the template's line break behind the end of the turn
                counts |= inside
            self.endless += not special and self.train_on != "all" and len(ends) == 0
            if row.prompt and self.train_on != "all":
                own = [token for token in alone[place] if token != end or token == self.tokenizer.bos_token_id]
                self.merged += list(ids[: len(own)]) != own
            if special and end is not None:
                if len(ids) == 0 or ids[-1] != end:
                    ids, counts = np.append(ids, end), np.append(counts, True)
                counts[-1] = True
            results.append((ids, counts))
        return results

    def _shared(self, text: str, ids: np.ndarray, options: Mapping[str, Any]) -> int:
        """How many tokens the beginning `text` shares with the whole."""
        start = np.asarray(self.tokenizer([text], **options)["input_ids"][0], np.int64)
        size = min(len(start), len(ids))
        different = np.flatnonzero(start[:size] != ids[:size])
        return int(different[0]) if len(different) else size
