"""What counts as a word where texts are compared: separators, case, Unicode, and where words stand in the text as written.

Rules, each a convention in use:

- `tulu3`: words between white space and `, . ? ! : ; ( ) " - \\`, as the analyzer of open-instruct cuts training data
  (arXiv 2411.15124); it leaves tabs and carriage returns inside words, which here separate.
- `whitespace`: words between white space, as open-r1 and s1 cut.
- `bare`: words between white space, ASCII punctuation deleted (`don't` is `dont`), as GPT-3 (arXiv 2005.14165) and the
  janitor of lm-eval do.
- `code`: runs of letters, digits and `_`, and every other character as a word of its own, so that operators count.
- `tokens`: the tokens of a model's tokenizer (`TokenWords`).
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trialist.kernels.ngrams import ALONE, BETWEEN, BREAK_BYTE, IN_WORD, SKIPPED, UNKNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
Unicode = Literal["as-is", "nfkc", "unaccented", "plain"]

WHITE = "".join(chr(code) for code in range(128) if chr(code).isspace())
OTHER_WHITE = re.compile("[" + "".join(chr(code) for code in range(128, 0x10000) if chr(code).isspace()) + "]")
TULU3 = ',.?!:;()"-\\'
RULES = ("tulu3", "whitespace", "bare", "code")
FORMS = ("as-is", "nfkc", "unaccented", "plain")
KEYBOARD = {"Pd": "-", "Ps": "(", "Pe": ")", "Pi": '"', "Pf": '"', "Pc": "_", "Po": "."}
"""What a mark of punctuation is on a keyboard, by its category in Unicode"""
EXCEPTIONS = {"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u2039": "'", "\u203a": "'", "\u2032": "'",
              "\u02bc": "'", "\u201e": '"', "\u2033": '"', "\u2212": "-"}  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Words by a table of bytes. Text is brought into one form of Unicode first, then lowered, then cut."""

    rule: Literal["tulu3", "whitespace", "bare", "code"] = "tulu3"
    unicode: Unicode = "as-is"
    """`nfkc` makes compatible characters equal (ﬁ and fi, full-width letters); `unaccented` also drops accents, `plain` also
    writes quotation marks, dashes and other punctuation as a keyboard has them"""
    lower: bool = True
    numbers: Literal["as-is", "equal"] = "as-is"
    """`equal` makes all numbers the same: digits in a row become one 0, with `bare` also over punctuation (1,200)"""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"words {self.rule!r}: one of {', '.join(RULES)}")
        if self.unicode not in FORMS:
            raise ValueError(f"unicode {self.unicode!r}: one of {', '.join(FORMS)}")
        if self.numbers not in ("as-is", "equal"):
            raise ValueError(f"numbers {self.numbers!r}: one of as-is, equal")

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """(256,) uint8: what each byte does, for `Phrases`."""
        kinds = np.full(256, IN_WORD, np.uint8)
        kinds[list(WHITE.encode())] = BETWEEN
        if self.rule == "tulu3":
            kinds[list(TULU3.encode())] = BETWEEN
        elif self.rule == "bare":
            kinds[list(string.punctuation.encode())] = SKIPPED
        elif self.rule == "code":
            kept = set(string.ascii_letters + string.digits + "_" + WHITE)
            kinds[[code for code in range(128) if chr(code) not in kept]] = ALONE
        return kinds

    def normalise(self, text: str) -> str:
        """The text in which words are cut. Letters of ASCII are left as they are: they are folded where they are read."""
        form = self._form(text)
        return form if self.numbers == "as-is" else self._number.sub("0", form)

    def _form(self, text: str) -> str:
        return text if text.isascii() else self._normalised(text)

    def _normalised(self, text: str) -> str:
        if self.unicode == "nfkc":
            text = unicodedata.normalize("NFKC", text)
        elif self.unicode != "as-is":
            if self.unicode == "plain":
                text = text.replace("\u00b4", "'")  # an acute accent on its own, which decomposes into a space
            decomposed = unicodedata.normalize("NFKD", text)
            text = "".join(character for character in decomposed if not unicodedata.combining(character))
            if self.unicode == "plain":
                text = text.translate(_keyboard())
        if self.lower:
            text = text.lower().replace("ς", "σ")  # `lower` ends words in ς: which one would depend on what follows
        return OTHER_WHITE.sub(" ", text)

    def encode(self, texts: Sequence[str]) -> bytes:
        """Bytes for `Phrases.search`; runs of words do not go from one text into the next."""
        return BREAK_BYTE.join([self.normalise(text).encode("utf-8", "surrogatepass") for text in texts])

    def split(self, text: str) -> list[bytes]:
        """The words of a text, as they are compared."""
        letters = self.normalise(text).encode("utf-8", "surrogatepass")
        words = self._of_bytes.findall(letters.lower() if self.lower else letters)  # `lower` takes the letters of ASCII
        if self.rule == "bare":
            return [kept for word in words if (kept := word.translate(None, string.punctuation.encode()))]
        return words

    def spans(self, text: str) -> list[Span]:
        """Where the words of `split` begin and end in the text as written, in characters."""
        normal = self.normalise(text)
        found = []
        for match in self._pattern.finditer(normal):
            if self._counts(match):
                begin, end = match.span()
                if self.rule == "bare":
                    end -= len(match[0]) - len(match[0].rstrip(string.punctuation))
                    begin += len(match[0]) - len(match[0].lstrip(string.punctuation))
                found.append((begin, end))
        return self.as_written(text, found)

    def as_written(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Spans of `normalise(text)` as spans of `text`."""
        return self._before_form(
            text, spans if self.numbers == "as-is" else self._with_numbers(self._form(text), spans)
        )

    def _with_numbers(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Spans of `text` with every number as 0, as spans of `text`."""
        places: list[int] = []
        shorter = [0]
        """By how much the text is shorter behind so many numbers"""
        for match in self._number.finditer(text):
            places.append(match.start() - shorter[-1])
            shorter.append(shorter[-1] + match.end() - match.start() - 1)
        return [
            (begin + shorter[bisect_left(places, begin)], end + shorter[bisect_left(places, end)])
            for begin, end in spans
        ]

    def _before_form(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Spans of `_form(text)` as spans of `text`."""
        if text.isascii() or (self.unicode == "as-is" and len(self._normalised(text)) == len(text)):
            return list(spans)
        first, behind = self._origins(text)
        return [(first[begin], behind[end - 1]) if end > begin else (first[begin],) * 2 for begin, end in spans]  # type: ignore[misc]

    def _origins(self, text: str) -> tuple[list[int], list[int]]:
        """For each character of `_normalised(text)` where what it comes from begins and ends in `text`.

        A piece of the text ends where normalising it and what follows apart gives the same as normalising them together.
        """
        first: list[int] = []
        behind: list[int] = []
        start, piece = 0, self._normalised(text[:1])
        for at in range(1, len(text) + 1):
            alone = self._normalised(text[at : at + 1])
            if at < len(text) and (joined := self._normalised(text[start : at + 1])) != piece + alone:
                piece = joined
                continue
            first += [start] * len(piece)
            behind += [at] * len(piece)
            start, piece = at, alone
        first.append(len(text))
        return first, behind

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        white = re.escape(WHITE)
        if self.rule == "tulu3":
            return re.compile(f"[^{white}{re.escape(TULU3)}]+")
        if self.rule == "code":
            return re.compile(rf"[A-Za-z0-9_\x80-\U0010ffff]+|[^{white}]")
        return re.compile(f"[^{white}]+")

    @functools.cached_property
    def _of_bytes(self) -> re.Pattern[bytes]:
        """The same for text in UTF-8, whose other characters consist of bytes from 0x80 on."""
        return re.compile(self._pattern.pattern.replace(r"\U0010ffff", r"\xff").encode())

    @functools.cached_property
    def _number(self) -> re.Pattern[str]:
        between = f"[{re.escape(string.punctuation)}]*" if self.rule == "bare" else ""
        return re.compile(rf"\d(?:{between}\d)*")

    def _counts(self, match: re.Match[str]) -> bool:
        return self.rule != "bare" or bool(match[0].strip(string.punctuation))


@functools.cache
def _keyboard() -> dict[int, str]:
    marks = ((code, unicodedata.category(chr(code))) for code in range(128, 0x10000))
    return {code: KEYBOARD[kind] for code, kind in marks if kind in KEYBOARD} | {
        ord(a): b for a, b in EXCEPTIONS.items()
    }


class TokenWords:
    """The tokens of a tokenizer as words. Special tokens are not added.

    tokenizer: `bytes`, an asset, a folder or a Hub id, as `load_tokenizer` takes; it must be a fast one.
    """

    rule = "tokens"

    def __init__(self, tokenizer: str) -> None:
        from trialist.data.tokenizers import load_tokenizer

        self.name = tokenizer
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(tokenizer)  # type: ignore[assignment]
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {tokenizer!r} cannot tell where its tokens stand in a text; take one that is fast"
            )

    def split(self, text: str) -> list[Hashable]:
        return list(self._encoded([text])["input_ids"][0])

    def spans(self, text: str) -> list[Span]:
        return [(int(begin), int(end)) for begin, end in self._encoded([text], offsets=True)["offset_mapping"][0]]

    def numbered(self, documents: Sequence[Sequence[str]], number_of: np.ndarray) -> list[np.ndarray]:
        """Word numbers of each document, its texts kept apart. number_of: (tokenizer ids,) uint32, `UNKNOWN` elsewhere."""
        texts = [text for document in documents for text in document]
        rows = iter(self._encoded(texts)["input_ids"] if texts else [])
        between = np.array([UNKNOWN], np.uint32)
        found = []
        for document in documents:
            pieces = [piece for _ in document for piece in (number_of[np.array(next(rows), np.int64)], between)]
            found.append(np.concatenate(pieces) if pieces else between)
        return found

    def _encoded(self, texts: list[str], offsets: bool = False) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)
