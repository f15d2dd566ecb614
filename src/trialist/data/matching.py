"""The options that decide what matches: shared by `trialist analyze contamination` and `trialist apply decontaminate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trialist.data.overlap import OverlapIndex
    from trialist.data.scan import Rule
    from trialist.data.streams import RowTexts
    from trialist.data.words import TokenWords, Words

PRESETS: dict[str, dict[str, Any]] = {
    "tulu3": {"n": 8, "rule": "tulu3", "coverage": 0.5, "words": "tulu3", "unicode": "as-is"},
    "open-r1": {"n": 8, "rule": "any", "coverage": 0.0, "words": "whitespace", "unicode": "as-is"},
    "gpt3": {"n": 13, "rule": "any", "coverage": 0.0, "words": "bare", "unicode": "as-is"},
    "datatrove": {"n": 12, "rule": "any", "coverage": 0.0, "words": "bare", "unicode": "unaccented"},
    "longest": {"n": 8, "rule": "longest", "coverage": 0.5, "words": "tulu3", "unicode": "as-is"},
}
"""Conventions in use. Sources: arXiv 2411.15124; open-r1 and s1; arXiv 2005.14165; datatrove; arXiv 2411.03923"""


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which items are looked for, how texts are compared, and when an item counts as contaminated."""

    benchmarks: tuple[str, ...]
    """Names (gsm8k, mmlu, ..., or `all` of the asset), local files (text files hold an item a line) or Hub ids"""
    preset: Literal["tulu3", "open-r1", "gpt3", "datatrove", "longest"] = "tulu3"
    """Convention that sets n, rule, coverage, words and unicode where these are not given"""
    n: int | None = None
    """Words in an n-gram, 1 to 64; without it the preset's, 8 for tulu3"""
    rule: Literal["tulu3", "any", "longest", "union"] | None = None
    """Contaminated is an item of which more than the coverage is covered by one row (tulu3), by one run of words in one row
    (longest) or by all rows together (union); or one that shares an n-gram (any)"""
    coverage: float | None = None
    """Share of an item's words that must be exceeded, 0 to 1; at 1 nothing is contaminated"""
    words: Literal["tulu3", "whitespace", "bare", "code", "tokens"] | None = None
    """Words end at white space and punctuation (tulu3), at white space (whitespace), there with punctuation deleted (bare),
    or at every symbol, which is a word itself (code); or they are the tokens of --tokenizer"""
    tokenizer: str | None = None
    """Model or folder whose tokens are the words, with --words tokens"""
    unicode: Literal["as-is", "nfkc", "unaccented"] | None = None
    """Make compatible characters equal (nfkc), and drop accents as well (unaccented)"""
    keep_case: bool = False
    """Tell capital and small letters apart"""
    short: Literal["exact", "count", "skip"] = "exact"
    """Items of fewer than n words: looked for whole and told in a column of their own, counted as contaminated, or left out"""
    common: float = 1.0
    """n-grams in more than this share of a benchmark's items are its template and do not count; 1 counts all"""
    ignored: str | None = None
    """Text file with a phrase a line (n words or more) whose n-grams do not count"""
    fields: tuple[str, ...] = ()
    """Columns of a training row to look at; without it messages, prompt or text"""
    roles: tuple[str, ...] = ("user",)
    """Turns of a conversation to look at: user, assistant, system, or all"""
    split: str | None = None
    """Split of the training data; without it train, or all there is"""
    benchmark_fields: tuple[str, ...] = ()
    """Columns that make up an item; without it its question"""
    benchmark_split: str | None = None
    """Split of benchmarks from files or the Hub; without it test, where there is one"""
    max_items: int | None = None
    """Most items of each benchmark"""

    def __post_init__(self) -> None:
        if not self.benchmarks:
            raise ValueError("--benchmarks: name at least one, for example gsm8k, or a file with the items")
        for name, low, high in (("n", 1, 64), ("coverage", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} must be from {low} to {high}, not {value}")
        if not 0 < self.common <= 1:
            raise ValueError(f"--common is a share above 0, at most 1, not {self.common}")
        if self.max_items is not None and self.max_items < 1:
            raise ValueError(f"--max-items must be at least 1, not {self.max_items}")
        if (self.tokenizer is not None) != (self.words == "tokens"):
            raise ValueError("--words tokens and --tokenizer MODEL go together: give both or neither")
        if self.words == "tokens" and (self.unicode or self.keep_case):
            raise ValueError(
                "--unicode and --keep-case are the tokenizer's business where words are tokens; leave them out"
            )

    def chosen(self, name: str) -> Any:
        """The option, or the preset's value for it."""
        given = getattr(self, name)
        return PRESETS[self.preset][name] if given is None else given

    def decision(self) -> Rule:
        from trialist.data.scan import Rule

        coverage = self.chosen("coverage")
        if self.rule is not None and self.coverage is None and self.rule != "any":
            coverage = PRESETS["tulu3"]["coverage"] if PRESETS[self.preset]["rule"] == "any" else coverage
        return Rule(self.chosen("rule"), coverage, self.short)

    def words_of(self) -> Words | TokenWords:
        from trialist.data.words import TokenWords, Words

        if self.tokenizer is not None:
            return TokenWords(self.tokenizer)
        return Words(self.chosen("words"), self.chosen("unicode"), not self.keep_case)

    def row_texts(self) -> RowTexts:
        from trialist.data.streams import RowTexts

        return RowTexts(self.fields, self.roles)

    def index(self, say: Callable[[str], None]) -> OverlapIndex:
        """The n-grams of all items. Raises the errors of `load_items`, and for an ignored phrase that is too short."""
        from trialist.data.benchmark_items import SOURCES, load_items
        from trialist.data.files import read_text
        from trialist.data.overlap import OverlapIndex

        ignored: list[str] = []
        if self.ignored is not None:
            ignored = [line for line in read_text(Path(self.ignored)).splitlines() if line.strip()]
        known = [name for name, source in SOURCES.items() if source.asset]
        names = [name for given in self.benchmarks for name in (known if given == "all" else [given])]
        benchmarks = [
            load_items(name, fields=self.benchmark_fields, split=self.benchmark_split, max_items=self.max_items)
            for name in dict.fromkeys(names)
        ]
        index = OverlapIndex(
            benchmarks, self.chosen("n"), self.words_of(), short=self.short, ignored=ignored, common=self.common
        )
        say(f"looking for {index.ngrams:,} n-grams of {len(index):,} items from {len(benchmarks)} benchmarks")
        return index

    def settings(self) -> dict[str, Any]:
        """What was matched and how, in JSON types."""
        rule = self.decision()
        return {
            "preset": self.preset,
            "n": self.chosen("n"),
            "rule": rule.name,
            "coverage": rule.threshold,
            "words": "tokens" if self.tokenizer else self.chosen("words"),
            "tokenizer": self.tokenizer,
            "unicode": None if self.tokenizer else self.chosen("unicode"),
            "keep case": None if self.tokenizer else self.keep_case,
            "short items": self.short,
            "common": self.common,
            "ignored": self.ignored,
            "fields": list(self.fields),
            "roles": list(self.roles),
            "split": self.split,
        }
