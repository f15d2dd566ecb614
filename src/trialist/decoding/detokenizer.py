"""Text from tokens as they come: whole characters only, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trialist.data.tokenizers import byte_characters

CONTEXT = 6
"""Tokens before the new ones that are decoded with them, because decoders treat the first token of a text in its own way"""
WINDOW = 24
"""Tokens decoded at a time before the oldest are let go"""
UNFINISHED = "\ufffd"
"""What decoders make of bytes that are no character, or not yet one"""
LONGEST = 3
"""Tokens that an unfinished character may have: it has four bytes at most"""


class Detokenizer:
    """Gives the text of each new token, holding back the bytes of a character that is not finished.

    before: tokens that the text continues, of which nothing is given again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._window = list(before[-CONTEXT:])
        self._given = len(self._decode(self._window).rstrip(UNFINISHED))
        self._waiting = 0

    def push(self, token: int) -> str:
        """The text that `token` makes certain; empty while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        end = len(text.rstrip(UNFINISHED))
        self._waiting = self._waiting + 1 if text.endswith(UNFINISHED) and end <= self._given else 0
        if self._waiting > LONGEST:  # no character is that long, so the first of these bytes are none
            end = max(end, len(text) - LONGEST)
        new = text[self._given : end]
        self._given = max(self._given, end)
        if len(self._window) > WINDOW and not text.endswith(UNFINISHED):
            self._let_go(text)
        return new

    def flush(self) -> str:
        """What was held back, as the end has come."""
        text = self._decode(self._window)
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _let_go(self, text: str) -> None:
        tail = self._window[-CONTEXT:]
        known = self._decode(tail)
        if text.endswith(known) and UNFINISHED not in known:  # it does not start within a character
            self._window, self._given = tail, len(known)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: Any = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )  # clean-up changes text that was given already
        return text


class StopStrings:
    """Lets text through up to the first of `stops`, which may come in any number of pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """What is certain to stand before a stop string; all that follows one is dropped."""
        if self.found:
            return ""
        self._held += text
        places = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._let_through(min(places))
        longest = max(map(len, self.stops), default=1) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self.stops):
                return self._let_through(start)
        return self._let_through(len(self._held))

    def flush(self) -> str:
        """What was held back as the possible start of a stop string."""
        return "" if self.found else self._let_through(len(self._held))

    def _let_through(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The token alone as text; bytes that are no whole character are shown as U+FFFD."""
    piece: Any = tokenizer.convert_ids_to_tokens(token)
    text: Any = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    starts_word = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
    return f" {text}" if starts_word else text  # decoders drop the space of a first word


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int] | None:
    """The bytes of a token, also where they are part of a character only; None where the tokenizer does not tell."""
    text = token_text(tokenizer, token)
    if UNFINISHED not in text:
        return list(text.encode())
    piece: Any = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return None
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    if len(piece) == 6 and piece.startswith("<0x"):
        return [int(piece[3:5], 16)]
    if all(character in byte_of for character in piece):
        return [byte_of[character] for character in piece]
    return None
