"""The options that decide what matches: shared by `trialist analyze contamination` and `trialist apply decontaminate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

    from trialist.data.overlap import OverlapIndex
    from trialist.data.scan import Rule
    from trialist.data.streams import RowTexts
    from trialist.data.words import TokenWords, Words

PRESETS: dict[str, dict[str, Any]] = {
    "tulu3": {"n": 8, "rule": "tulu3", "coverage": 0.5, "words": "tulu3", "unicode": "as-is", "numbers": "as-is"},
    "full-string": {"n": 8, "rule": "whole", "coverage": 0.0, "words": "tulu3", "unicode": "as-is", "numbers": "as-is"},
    "open-r1": {"n": 8, "rule": "any", "coverage": 0.0, "words": "whitespace", "unicode": "as-is", "numbers": "as-is"},
    "gpt3": {"n": 13, "rule": "any", "coverage": 0.0, "words": "bare", "unicode": "as-is", "numbers": "as-is"},
    "datatrove": {"n": 12, "rule": "any", "coverage": 0.0, "words": "bare", "unicode": "plain", "numbers": "equal"},
    "longest": {"n": 8, "rule": "longest", "coverage": 0.5, "words": "tulu3", "unicode": "as-is", "numbers": "as-is"},
}
"""Conventions in use. Sources: arXiv 2411.15124 (twice); open-r1 and s1; arXiv 2005.14165; datatrove; arXiv 2411.03923"""


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which items are looked for, how texts are compared, and when an item counts as contaminated."""

    benchmarks: tuple[str, ...]
    """Names (gsm8k, mmlu, ..., or `all` of the asset), local files (text files hold an item a line) or Hub ids; columns of an
    item stand behind a colon: exam.jsonl:body,question, owner/name::body, owner/name:configuration:body"""
    preset: Literal["tulu3", "full-string", "open-r1", "gpt3", "datatrove", "longest"] = "tulu3"
    """Convention that sets n, rule, coverage, words, unicode and numbers where these are not given"""
    n: int | None = None
    """Words in an n-gram, 1 to 64; without it the preset's, 8 for tulu3"""
    rule: Literal["tulu3", "any", "whole", "longest", "union"] | None = None
    """Contaminated is an item of which more than the coverage is covered by one row (tulu3), by one run of words in one row
    (longest) or by all rows together (union); one that shares an n-gram (any); or one that stands whole in a row (whole)"""
    coverage: float | None = None
    """Share of an item that must be exceeded, 0 to 1; at 1 nothing is contaminated. any and whole take none but 0 and 1"""
    words: Literal["tulu3", "whitespace", "bare", "code", "tokens"] | None = None
    """Words end at white space and punctuation (tulu3), at white space (whitespace), there with punctuation deleted (bare),
    or at every symbol, which is a word itself (code); or they are the tokens of --tokenizer"""
    tokenizer: str | None = None
    """Model or folder whose tokens are the words, with --words tokens"""
    unicode: Literal["as-is", "nfkc", "unaccented", "plain"] | None = None
    """Make compatible characters equal (nfkc), drop accents as well (unaccented), and write quotation marks and dashes as a
    keyboard has them (plain)"""
    numbers: Literal["as-is", "equal"] | None = None
    """Tell numbers apart, or make all of them equal, so that a problem with other numbers is found"""
    keep_case: bool = False
    """Tell capital and small letters apart"""
    short: Literal["exact", "count", "skip"] = "exact"
    """Items of fewer than n words: looked for whole and told in a column of their own, counted as contaminated, or left out"""
    common: float = 1.0
    """n-grams in more than this share of a benchmark's items are its template and do not count; 1 counts all"""
    ignored: str | None = None
    """Text file with a phrase a line (n words or more) whose n-grams do not count"""
    fields: tuple[str, ...] = ()
    """Columns of a training row to look at, where none are named with the data; without them messages, prompt or text"""
    roles: tuple[str, ...] = ("user",)
    """Turns of a conversation to look at: user, assistant, system, or all"""
    split: str | None = None
    """Split of the training data; without it train, or all there is"""
    benchmark_split: str | None = None
    """Split of benchmarks that are files or Hub ids; without it test, where there is one"""
    max_items: int | None = None
    """Most items of each benchmark"""
    jobs: int = 1
    """Processes that scan; each reads the benchmarks for itself"""

    def __post_init__(self) -> None:
        if not self.benchmarks:
            raise ValueError("--benchmarks: name at least one, for example gsm8k, or a file with the items")
        for name, low, high in (("n", 1, 64), ("coverage", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} must be from {low} to {high}, not {value}")
        if not 0 < self.common <= 1:
            raise ValueError(f"--common is a share above 0, at most 1, not {self.common}")
        for name in ("max_items", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.chosen("rule") in ("any", "whole") and self.coverage is not None and 0 < self.coverage < 1:
            raise ValueError(
                f"--coverage {self.coverage} says nothing where the rule is {self.chosen('rule')}: leave it out, or take --rule "
                "tulu3"
            )
        if (self.tokenizer is not None) != (self.words == "tokens"):
            raise ValueError("--words tokens and --tokenizer MODEL go together: give both or neither")
        if self.words == "tokens" and (self.unicode or self.keep_case or self.numbers):
            raise ValueError(
                "--unicode, --numbers and --keep-case are the tokenizer's business where words are tokens; leave them out"
            )

    def chosen(self, name: str) -> Any:
        """The option, or the preset's value for it."""
        given = getattr(self, name)
        return PRESETS[self.preset][name] if given is None else given

    def decision(self) -> Rule:
        from trialist.data.scan import Rule

        preset = PRESETS[self.preset]
        same = self.chosen("rule") == preset["rule"]
        return Rule(
            self.chosen("rule"), preset["coverage"] if same and self.coverage is None else self.coverage, self.short
        )

    def words_of(self) -> Words | TokenWords:
        from trialist.data.words import TokenWords, Words

        if self.tokenizer is not None:
            return TokenWords(self.tokenizer)
        return Words(self.chosen("words"), self.chosen("unicode"), not self.keep_case, self.chosen("numbers"))

    def row_texts(self, columns: tuple[str, ...] = ()) -> RowTexts:
        """What is looked at in a row. columns: those that were named with the data."""
        from trialist.data.streams import RowTexts

        return RowTexts(columns or self.fields, self.roles)

    def index(self, say: Callable[[str], None], tables: Mapping[str, Dataset] | None = None) -> OverlapIndex:
        """The n-grams of all items. tables: data sets by the names that stand for them in `benchmarks`.

        Raises the errors of `load_items`, and ValueError for an ignored phrase that is too short.
        """
        from trialist.data.benchmark_items import load_items
        from trialist.data.benchmark_sources import SOURCES
        from trialist.data.files import read_text
        from trialist.data.overlap import OverlapIndex

        ignored: list[str] = []
        if self.ignored is not None:
            ignored = [line for line in read_text(Path(self.ignored)).splitlines() if line.strip()]
        known = [name for name, source in SOURCES.items() if source.asset]
        names = [name for given in self.benchmarks for name in (known if given == "all" else [given])]
        benchmarks = [
            load_items(name, split=self.benchmark_split, max_items=self.max_items, table=(tables or {}).get(name))
            for name in dict.fromkeys(names)
        ]
        index = OverlapIndex(
            benchmarks, self.chosen("n"), self.words_of(), short=self.short, ignored=ignored, common=self.common
        )
        say(f"looking for {index.ngrams:,} n-grams of {len(index):,} items from {len(benchmarks)} benchmarks")
        for remark in remarks(index):
            say(remark)
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
            "numbers": None if self.tokenizer else self.chosen("numbers"),
            "keep case": None if self.tokenizer else self.keep_case,
            "short items": self.short,
            "common": self.common,
            "ignored": self.ignored,
            "fields": list(self.fields),
            "roles": list(self.roles),
            "split": self.split,
        }


def remarks(index: OverlapIndex) -> list[str]:
    """What to know of the benchmarks before rates are read."""
    found = []
    for number, items in enumerate(index.benchmarks):
        if items.remark:
            found.append(f"{items.name}: {items.remark}")
        own = index.item_benchmark == number
        if (short := int((index.item_short & own).sum())) * 2 > len(items):
            found.append(
                f"{items.name}: {short:,} of {len(items):,} items are shorter than {index.n} words and hold no n-gram; take a "
                "lower --n, or --words tokens where white space does not part words"
            )
    return found
