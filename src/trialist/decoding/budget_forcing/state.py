"""What budget forcing does with one sequence: from the state after its tokens to what the next token may be (arXiv 2501.19393).

A sequence goes through `before` (the thinking segment is not open yet), `thinking`, `answer` and `finished`. Forced strings are
queues of tokens, each written once. Plain Python: the tensors are in `budget_forcing_processor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["before", "thinking", "answer", "finished"]
Ended = Literal["natural", "forced", "open", "absent"]


@dataclass(frozen=True)
class Thinking:
    """What happened in the thinking segment of one sequence."""

    tokens: int
    """Tokens of thought, strings written in place of an end included, delimiters not"""
    ignores: int
    """Ends that were put off"""
    ended: Ended
    """`natural`: by the model; `forced`: by the budget; `open`: generation stopped within; `absent`: the model never began"""
    answer_tokens: int
    """Tokens that the model wrote after the segment, those of `final_prefix` and the end of the sequence not among them"""


@dataclass(frozen=True, slots=True)
class State:
    """A sequence after some tokens, and what was decided on the next one."""

    phase: Phase
    text: str = ""
    """The end of the generated text, where a delimiter is looked for"""
    queue: tuple[int, ...] = ()
    """Tokens that must be written next"""
    thinking: int = 0
    answer: int = 0
    ignores: int = 0
    fresh: bool = False
    """Whether the last token ended a string written in place of an end: one token of thought at least must follow"""
    ended: Ended = "open"

    @property
    def report(self) -> Thinking:
        ended = "absent" if self.phase == "before" else self.ended
        return Thinking(self.thinking, self.ignores, ended, self.answer)


class Pieces:
    """The text of each token, looked up once for the whole vocabulary when it is first needed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._texts: list[str] | None = None

    def __getitem__(self, token: int) -> str:
        return self.texts[token] if token < len(self.texts) else ""

    @property
    def texts(self) -> list[str]:
        if self._texts is None:
            # behind another token, for some tokenizers swallow the space before a first word
            anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
            before = len(self.tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
            rows = [[*anchor, token] for token in range(len(self.tokenizer))]
            texts = self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
            self._texts = [text[before:] for text in texts]
        return self._texts


class Delimiter:
    """A string that opens or closes thinking, as tokens.

    A delimiter whose first token stands in no other text, because it is an added token of the tokenizer, is recognised by that
    token. Another one is recognised in the text, however it is split into tokens: by the token that completes it.
    """

    def __init__(self, tokenizer: Any, text: str, name: str, pieces: Pieces) -> None:
        self.text, self.pieces = text, pieces
        self.ids = encode_inside(tokenizer, text, name)
        whole = added_tokens(tokenizer)
        self.added = self.ids[0] in whole
        self._other = (
            frozenset() if self.added else whole
        )  # an added token that spells a part of plain text is not that text
        self._completing: dict[int, frozenset[int]] = {}
        self._tokenizer, self._name = tokenizer, name

    @property
    def by_token(self) -> bool:
        """Whether one token is all that has to be looked at."""
        return self.added and len(self.ids) == 1

    def matched(self, text: str) -> int:
        """Characters of the longest start of the delimiter with which `text` ends; the whole delimiter does not count."""
        longest = min(len(text), len(self.text) - 1)
        return next((length for length in range(longest, 0, -1) if text.endswith(self.text[:length])), 0)

    def rest(self, text: str) -> tuple[int, ...]:
        """Tokens that complete the delimiter after `text`."""
        matched = 0 if self.added else self.matched(text)
        return self.ids if not matched else encode_inside(self._tokenizer, self.text[matched:], self._name)

    def completing(self, text: str) -> frozenset[int]:
        """Tokens after which `text` would hold the delimiter."""
        if self.by_token:
            return frozenset(self.ids)
        found = self._completed_from(0)
        for length in range(1, min(len(text), len(self.text) - 1) + 1):
            if text.endswith(self.text[:length]):
                found |= self._completed_from(length)
        return found

    def _completed_from(self, matched: int) -> frozenset[int]:
        if matched not in self._completing:
            rest = self.text[matched:]
            self._completing[matched] = frozenset(
                token
                for token, piece in enumerate(self.pieces.texts)
                if (self.text in piece if matched == 0 else piece.startswith(rest)) and token not in self._other
            )
        return self._completing[matched]


@dataclass(frozen=True)
class Rules:
    """The limits of one call of `generate`, as tokens."""

    start: Delimiter | None
    end: Delimiter
    ignore: tuple[int, ...]
    forced: tuple[tuple[int, ...], tuple[int, ...]]
    """What a forced end writes: behind a trace that ends as `separator`, and behind another"""
    separator: str
    prefix: tuple[int, ...]
    """What a forced end writes behind the delimiter"""
    last_text: Callable[[int], str]
    """Text of one token"""
    eos: frozenset[int]
    stop: int | None
    """What ends an answer that has its number of tokens"""
    maximum: int | None
    minimum: int
    num_ignore: int
    max_answer: int | None

    @property
    def reads_text(self) -> bool:
        """Whether delimiters are looked for in the text."""
        return not self.end.added or (self.start is not None and not self.start.by_token)

    @property
    def longest_delimiter(self) -> int:
        return max(len(self.end.text), len(self.start.text) if self.start else 0)

    def first(self, prompt: str) -> State:
        """The state behind a prompt: within a segment that it opened, or before one."""
        inside = self.start is None or prompt.rfind(self.start.text) > prompt.rfind(self.end.text)
        return State("thinking" if inside else "before")

    def ends(self, state: State) -> frozenset[int]:
        """Tokens that would end the segment here: the end of the sequence among them, without which no delimiter is needed."""
        return self.eos | ({self.end.ids[0]} if self.end.added else self.end.completing(state.text))

    def undecided(self, state: State) -> bool:
        """Whether what happens next depends on which token the model would take."""
        return state.phase == "thinking" and not state.queue and not self.spent(state)

    def spent(self, state: State) -> bool:
        return self.maximum is not None and state.thinking >= self.maximum

    def may_ignore(self, state: State) -> bool:
        """Whether an end is put off: strings are left, and room for the whole string and a token of thought behind it."""
        room = self.maximum is None or state.thinking + len(self.ignore) < self.maximum
        return state.ignores < self.num_ignore and room

    def plan(self, state: State, proposed: int | None, last: int | None) -> tuple[State, int | None, frozenset[int]]:
        """The state with what begins here, the token that must come next (None: the model's), and tokens that must not.

        proposed: the token that the model would take, looked at where `undecided` only.   last: the token before.
        """
        if state.queue:
            return state, state.queue[0], frozenset()
        if state.phase == "answer" and self.max_answer is not None and state.answer >= self.max_answer:
            return state, self.stop, frozenset()
        if state.phase != "thinking":
            return state, None, frozenset()
        if self.spent(state):
            return self._ending(state, last)
        ends = self.ends(state)
        ignoring = self.may_ignore(state) and not state.fresh
        early = state.fresh or state.thinking < self.minimum
        if proposed in ends and ignoring and self.ignore:
            begun = dataclasses.replace(state, queue=self.ignore, ignores=state.ignores + 1)
            return begun, begun.queue[0], frozenset()
        if (
            proposed in ends and ignoring
        ):  # nothing is written in place of the end, the model goes on with another token
            return dataclasses.replace(state, ignores=state.ignores + 1), None, ends
        if ignoring or early:
            return state, None, ends
        if proposed in self.eos:
            begun = dataclasses.replace(state, queue=self.end.rest(state.text), ended="natural")
            return begun, begun.queue[0], frozenset()
        return state, None, self.eos

    def _ending(self, state: State, last: int | None) -> tuple[State, int, frozenset[int]]:
        """A forced end. One that the model has begun to write as plain text is completed."""
        if not self.end.added and self.end.matched(state.text):
            queue = self.end.rest(state.text) + self.prefix
        else:
            closed = last is not None and bool(self.separator) and self.last_text(last).endswith(self.separator)
            queue = self.forced[0 if closed else 1]
        begun = dataclasses.replace(state, queue=queue, ended="forced")
        return begun, queue[0], frozenset()

    def follow(self, state: State, token: int, pieces: Pieces) -> State:
        """The state after `token`."""
        if state.phase == "finished":
            return state
        text = state.text
        if self.reads_text:
            text = (text + pieces[token])[-2 * self.longest_delimiter :]
        if state.queue:
            return self._written(dataclasses.replace(state, text=text), token)
        if state.phase == "before":
            assert self.start is not None
            opened = token in self.start.completing(state.text)
            return dataclasses.replace(state, phase="thinking" if opened else "before", text="" if opened else text)
        if state.phase == "answer":
            ended = token in self.eos
            return dataclasses.replace(
                state, phase="finished" if ended else "answer", answer=state.answer + (not ended)
            )
        if token in self.eos:  # no token of thought: something other than the model ended the sequence
            return dataclasses.replace(state, phase="finished")
        if token in self.ends(state):
            rest = self.end.ids[1:] if self.end.added else ()
            phase: Phase = "thinking" if rest else "answer"
            return dataclasses.replace(state, phase=phase, queue=rest, ended="natural", text=text, fresh=False)
        return dataclasses.replace(state, thinking=state.thinking + 1, text=text, fresh=False)

    def _written(self, state: State, token: int) -> State:
        """After a token of a queue."""
        if token != state.queue[0]:  # a hypothesis that is out of the running, or a row that something else ended
            return dataclasses.replace(state, phase="finished", queue=())
        rest = state.queue[1:]
        if state.ended == "open":  # a string in place of an end
            return dataclasses.replace(state, queue=rest, thinking=state.thinking + 1, fresh=not rest)
        return dataclasses.replace(state, queue=rest, phase="thinking" if rest else "answer", fresh=False)


def encode_inside(tokenizer: Any, text: str, name: str) -> tuple[int, ...]:
    """Tokens of `text` in the middle of another: without special tokens, and without the space that some tokenizers put
    before a first word. Raises ValueError, naming the argument, where there are none or where they do not spell the text."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if _spelled(tokenizer, ids) != text:
        for before in (".", "a", "\n"):
            start = list(tokenizer.encode(before, add_special_tokens=False))
            whole = list(tokenizer.encode(before + text, add_special_tokens=False))
            rest = whole[len(start) :]
            spelled = tokenizer.decode(whole, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if whole[: len(start)] == start and spelled.endswith(text):
                ids = rest
                break
        else:
            ids = []
    if not ids:
        raise ValueError(
            f"{name}={text!r} tokenises to nothing that spells it with this tokenizer; choose another string, such as one that "
            "the model's chat template uses"
        )
    return tuple(ids)


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of the tokens as it stands after other text: a word piece that begins a word has its space."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids[:1]))
    space = " " if pieces and isinstance(pieces[0], str) and pieces[0].startswith("▁") else ""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if not space or text.startswith(" ") else space + text


def added_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that were added to the vocabulary whole: no other text is split into them."""
    return frozenset(getattr(tokenizer, "added_tokens_decoder", {}) or {})
