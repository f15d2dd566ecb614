"""Constraints on the form of an answer that a program can check, under the names and keywords of IFEval (arXiv 2311.07911).

Departure: words are runs of word characters and sentences end at `.`, `!` or `?`, where IFEval asks a tokenizer of natural
language. Constraints on the language of an answer are not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RELATIONS = ("less than", "at least")
Constraint = tuple[str, dict[str, Any]]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def occurrences(text: str, keyword: str) -> int:
    return len(re.findall(rf"\b{re.escape(keyword)}\b", text, re.IGNORECASE))


def _counted(count: int, wanted: int, relation: str) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _sentences(text: str) -> int:
    return len(re.findall(r"[^.!?\s][^.!?]*", text))


def _paragraphs(text: str) -> int:
    return sum(bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", text))


def _is_json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except ValueError:
        return False
    return True


def _quoted(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


def _cased(text: str, changed: str) -> bool:
    return text == changed and any(map(str.isalpha, text))


CHECKS: Mapping[str, tuple[dict[str, type], Callable[..., bool]]] = {
    "keywords:existence": (
        {"keywords": list}, lambda text, keywords: all(occurrences(text, word) for word in keywords),
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": list}, lambda text, forbidden_words: not any(occurrences(text, w) for w in forbidden_words),
    ),
    "keywords:frequency": (
        {"keyword": str, "frequency": int, "relation": str},
        lambda text, keyword, frequency, relation: _counted(occurrences(text, keyword), frequency, relation),
    ),
    "length_constraints:number_words": (
        {"num_words": int, "relation": str},
        lambda text, num_words, relation: _counted(len(words(text)), num_words, relation),
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": int, "relation": str},
        lambda text, num_sentences, relation: _counted(_sentences(text), num_sentences, relation),
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": int}, lambda text, num_paragraphs: _paragraphs(text) == num_paragraphs,
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": int},
        lambda text, num_placeholders: len(re.findall(r"\[[^\]]*\]", text)) >= num_placeholders,
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": int},
        lambda text, num_bullets: len(re.findall(r"^\s*(?:\*[^*]|-).*$", text, re.MULTILINE)) == num_bullets,
    ),
    "detectable_format:title": ({}, lambda text: re.search(r"<<[^\n<>]*[^\s<>][^\n<>]*>>", text) is not None),
    "detectable_format:json_format": ({}, _is_json),
    "change_case:english_lowercase": ({}, lambda text: _cased(text, text.lower())),
    "change_case:english_capital": ({}, lambda text: _cased(text, text.upper())),
    "startend:end_checker": (
        {"end_phrase": str},
        lambda text, end_phrase: text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    ),
    "startend:quotation": ({}, _quoted),
    "punctuation:no_comma": ({}, lambda text: "," not in text),
}  # fmt: skip
"""Name -> its keywords with their types, and the check of a text"""


def read_constraints(given: Any) -> list[Constraint]:
    """Names and keywords from IFEval's two columns: `{"instruction_id_list": [...], "kwargs": [...]}`, or the JSON of it.

    Raises ValueError that says what is wrong: another form, a name that is not in `CHECKS`, a keyword that is missing or of
    another type.
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        found = None
    names, options = (_list(found, key) for key in ("instruction_id_list", "kwargs"))
    if not names or len(names) != len(options):
        raise ValueError(
            f'{str(given)[:60]!r} names no constraints; wanted is {{"instruction_id_list": [names], "kwargs": [as many '
            "objects]}, or the JSON of it"
        )
    return [(str(name), _keywords(str(name), more or {})) for name, more in zip(names, options)]


def meets(text: str, constraints: Sequence[Constraint]) -> bool:
    """Whether a text that is not blank meets all of them."""
    return bool(text.strip()) and all(CHECKS[name][1](text, **keywords) for name, keywords in constraints)


def _list(found: Any, key: str) -> list[Any]:
    value = found.get(key) if isinstance(found, Mapping) else None
    return value if isinstance(value, list) else []


def _keywords(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a constraint. Tables fill those of others with None, and make numbers floats."""
    if name not in CHECKS:
        raise ValueError(f"no constraint {name!r}; there are {', '.join(CHECKS)}")
    keywords: dict[str, Any] = {}
    for keyword, kind in CHECKS[name][0].items():
        value = given.get(keyword) if isinstance(given, Mapping) else None
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not _fits(value, kind):
            raise ValueError(f"constraint {name!r} needs {keyword!r} ({kind.__name__}), and has {value!r}")
        keywords[keyword] = value
    if keywords.get("relation", RELATIONS[0]) not in RELATIONS:
        raise ValueError(
            f"constraint {name!r}: 'relation' is one of {', '.join(RELATIONS)}, not {keywords['relation']!r}"
        )
    return keywords


def _fits(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word for word in value)
    return isinstance(value, kind) and not isinstance(value, bool) and value != ""
