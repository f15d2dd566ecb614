"""What scans of training data found, in JSON types and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trialist.data.overlap import OverlapIndex
from trialist.data.scan import Match, Scan

LISTED_PHRASES = 50
ALIKE = 0.9
"""Neighbouring n-grams are one phrase when the rarer is in at least this share of the other's rows"""
EDGES = (0.0, 0.25, 0.5, 0.75)
"""Items are counted by share: none, up to each of these, below 1, and 1"""
TABLE = ("items", "contaminated", "rate", "low", "high", "sharing", "short", "short found", "ignored", "empty")


def described(scan: Scan, rate: float) -> dict[str, Any]:
    """What a scan found. rate: the share of items above which a benchmark is contaminated."""
    index = scan.index
    share, union = scan.share(), scan.union()
    contaminated, found_short = scan.contaminated(), scan.found_short()
    benchmarks = []
    for number, items in enumerate(index.benchmarks):
        own = index.item_benchmark == number
        hit, size = int(contaminated[own].sum()), len(items)
        low, high = wilson(hit, size)
        benchmarks.append(
            {
                "name": items.name,
                "items": size,
                "contaminated": hit,
                "rate": hit / size if size else None,
                "low": low,
                "high": high,
                "above": bool(size and hit / size > rate),
                "sharing": int(((scan.sharing > 0) & own & ~index.item_short).sum()),
                "short": int((index.item_short & own).sum()),
                "short found": int((found_short & own).sum()),
                "ignored": int((index.item_ignored & own).sum()),
                "empty": int((index.item_empty & own).sum()),
                "by share": by_share(share[own & index.item_comparable]),
            }
        )
    matches = scan.matches
    order = sorted(matches, key=lambda item: (-share[item], index.item_benchmark[item], item))
    return {
        "rows": scan.rows,
        "rows without text": scan.empty,
        "characters": scan.characters,
        "rows sharing an n-gram": scan.rows_sharing,
        # by `union` rows contaminate together only
        "rows contaminating": None if scan.rule.name == "union" else scan.rows_contaminating,
        "benchmarks": benchmarks,
        "items": [_item(scan, item, matches[item], share, union, contaminated) for item in order],
        "frequent phrases": list(frequent_phrases(scan)),
    }


def _item(scan: Scan, item: int, match: Match, share: Any, union: Any, contaminated: Any) -> dict[str, Any]:
    index = scan.index
    benchmark, name = index.name(item)
    return {
        "benchmark": benchmark,
        "id": name,
        "contaminated": bool(contaminated[item]),
        "short": bool(index.item_short[item]),
        "words": int(index.item_words[item]),
        "words compared": int(index.item_words[item] if index.item_short[item] else index.item_left[item]),
        "share": round(float(share[item]), 6),
        "coverage": round(float(scan.coverage[item]), 6),
        "longest": round(float(scan.longest[item]), 6),
        "union": round(float(union[item]), 6),
        "rows sharing": int(scan.sharing[item]),
        "rows contaminating": None if scan.rule.name == "union" else int(scan.exceeding[item]),
        "fields": [writable(text) for text in index.texts(item)],
        "spans": [list(span) for span in match.spans],
        "row": str(match.place),
        "row text": writable(match.excerpt.text),
        "row spans": [list(span) for span in match.excerpt.marks],
        "row goes on": list(match.excerpt.cut),
    }


def frequent_phrases(scan: Scan, most: int = LISTED_PHRASES) -> Iterator[dict[str, Any]]:
    """The phrases that join most pairs of item and row; those that join one are left out.

    A phrase is a chain of n-grams that follow each other wherever they stand in items, in about as many rows.
    """
    index = scan.index
    behind = _followers(scan)
    before = np.full(index.ngrams, -1)
    before[behind[behind >= 0]] = np.flatnonzero(behind >= 0)
    items = _items_of(index)
    pairs = np.where(index.is_ngram, scan.frequency * items, 0)
    used = np.zeros(index.ngrams, bool)
    for phrase in np.argsort(-pairs, kind="stable").tolist():
        if most == 0 or pairs[phrase] <= 1:
            return
        if used[phrase]:
            continue
        chain = [phrase]
        while before[chain[0]] >= 0 and not used[before[chain[0]]] and before[chain[0]] not in chain:
            chain.insert(0, int(before[chain[0]]))
        while behind[chain[-1]] >= 0 and not used[behind[chain[-1]]] and behind[chain[-1]] not in chain:
            chain.append(int(behind[chain[-1]]))
        used[chain] = True
        rows = int(scan.frequency[chain].min())
        most -= 1
        yield {
            "text": writable(index.text_at(int(index.postings[index.posting_begin[chain[0]]]), len(chain))),
            "rows": rows,
            "share of rows": round(rows / scan.rows, 6),
            "items": int(items[phrase]),
        }


def _followers(scan: Scan) -> np.ndarray:
    """(phrases,): the n-gram that begins one word later wherever this one stands, if it is in about as many rows, or -1."""
    index = scan.index
    phrases = np.flatnonzero((scan.frequency > 0) & index.is_ngram)
    behind = np.full(index.ngrams, -1)
    counts = np.diff(index.posting_begin)
    phrases = phrases[counts[phrases] > 0]
    if not len(phrases):
        return behind
    ends = np.cumsum(counts[phrases])
    at = np.arange(ends[-1]) + np.repeat(index.posting_begin[phrases] - (ends - counts[phrases]), counts[phrases])
    place = index.postings[at]
    next_place = np.minimum(place + 1, len(index.flat) - 1)
    follows = (index.field_of[next_place] == index.field_of[place]) & (next_place > place)
    follower = np.where(follows, index.phrase_of[next_place].astype(np.int64), -1)
    follower[follower >= index.ngrams] = -1  # no n-gram begins there
    first = ends - counts[phrases]
    same = np.minimum.reduceat(follower, first) == np.maximum.reduceat(follower, first)
    candidate = follower[first]
    good = same & (candidate >= 0)
    phrases, candidate = phrases[good], candidate[good]
    a, b = scan.frequency[phrases], scan.frequency[candidate]
    good = (counts[candidate] == counts[phrases]) & (np.minimum(a, b) >= ALIKE * np.maximum(a, b))
    behind[phrases[good]] = candidate[good]
    return behind


def _items_of(index: OverlapIndex) -> np.ndarray:
    """(phrases,): how many items hold each n-gram."""
    owner = np.repeat(np.arange(index.ngrams), np.diff(index.posting_begin))
    item = index.field_item[index.field_of[index.postings]]
    new = np.ones(len(owner), bool)  # places of a phrase increase, and so do their items
    new[1:] = (owner[1:] != owner[:-1]) | (item[1:] != item[:-1])
    return np.bincount(owner[new], minlength=index.ngrams)


def by_share(share: Any) -> list[int]:
    """How many items have a share of 0, up to 1/4, up to 1/2, up to 3/4, below 1, and 1."""
    counts = [int((share == 0).sum())]
    for low, high in zip(EDGES, (*EDGES[1:], 1.0)):
        counts.append(int(((share > low) & ((share <= high) if high < 1 else (share < 1))).sum()))
    return [*counts, int((share == 1).sum())]


def wilson(hits: int, size: int) -> tuple[float | None, float | None]:
    """95 % interval of Wilson for a share, as if the items were drawn one by one from items like them; None without items."""
    if not size:
        return None, None
    z = 1.959964
    share, spread = hits / size, z * z / size
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / size + spread / (4 * size)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def table(report: Mapping[str, Any]) -> str:
    """Tab-separated: a line for each data set and benchmark."""
    lines = [("data", "benchmark", *TABLE)]
    for train in report["train"]:
        for entry in train["benchmarks"]:
            lines.append((train["name"], entry["name"], *(_cell(entry[column]) for column in TABLE)))
    return "".join("\t".join(" ".join(cell.split()) for cell in line) + "\n" for line in lines)


def _cell(value: float | int | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """What to show at the end: rows, and of each benchmark what is contaminated."""
    trains = report["train"]
    shown = {}
    for train in trains:
        rows = f"{train['rows']:,}"
        if train["rows contaminating"] is not None:
            rows += f" ({train['rows contaminating']:,} contaminate an item)"
        shown["rows" if len(trains) == 1 else f"rows of {train['name']}"] = rows
    for number, benchmark in enumerate(report["benchmarks"]):
        entries = [(train["name"], train["benchmarks"][number]) for train in trains]
        hits = [(name, entry) for name, entry in entries if entry["contaminated"]]
        if len(trains) == 1:
            text = _found(entries[0][1])
        elif not hits:
            text = f"0 of {benchmark['items']:,} items"
        else:
            text = "; ".join(f"{_found(entry)} in {name}" for name, entry in hits)
        if len(trains) == 1 and (short := entries[0][1]["short"]):
            text += f"; {entries[0][1]['short found']:,} of {short:,} short items stand whole in a row"
        shown[benchmark["name"]] = text
    return shown


def _found(entry: Mapping[str, Any]) -> str:
    text = f"{entry['contaminated']:,} of {entry['items']:,} items"
    if entry["rate"] is not None:
        text += f", {entry['rate']:.2%} [{entry['low']:.2%}, {entry['high']:.2%}]"
    return text


def templates(report: Mapping[str, Any]) -> list[str]:
    """The frequent phrases that stand in several items, a line each: what `--ignored` reads."""
    texts = (entry["text"] for train in report["train"] for entry in train["frequent phrases"] if entry["items"] > 1)
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


def writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
