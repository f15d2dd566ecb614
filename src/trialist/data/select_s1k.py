"""A small training set of reasoning by quality, difficulty and diversity: the selection of s1K (arXiv 2501.19393).

Quality: rows with errors or defects of format go, rows of trusted sources are taken at once. Difficulty: what a model already
solves goes. Diversity: a domain is drawn, then a row of it, long traces more probably (weight 2^-rank, the longest has rank 0),
until there are enough. The paper draws domains uniformly; its code also has a variant which does so up to a number of rows and
then in proportion to the domains of the benchmarks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
STEP = "selected_for"
"""Column of the rows that are selected: `quality` or `diversity`"""
DEFECTS = {
    "an image": r"!\[[^\]]*\]\([^)]*\)|<img\b|\bdata:image/|\.(?:png|jpe?g|gif|svg)\b|\[asy\]|\\includegraphics",
    "a drawing in characters": r"(?:^[^\S\n]*[-+|/\\_=*#<>^.:][-+|/\\_=*#<>^.:\s]{5,}$\n?){3,}",
    "a reference to a part that is not there": r"(?:^|\s)p[0-9]+\.(?:\s|$)|\b(?:see|in|shown in) (?:the )?(?:figure|diagram)\b",
}
"""What a defect of format looks like, as patterns over question and trace. The paper names the kinds, not the patterns"""


@dataclass(frozen=True)
class Selection:
    rows: list[dict[str, Any]]
    """As they were, with a column `selected_for`; first those of trusted sources in their order, then in the order drawn"""
    counts: dict[str, int]
    """Rows after each step"""


def select_s1k(
    rows: Sequence[Row],
    *,
    count: int = 1000,
    broken: Callable[[Row], bool] = lambda row: False,
    defective: Callable[[Row], bool] = lambda row: False,
    trusted: Callable[[Row], bool] = lambda row: False,
    solved: Callable[[Row], bool],
    domain: Callable[[Row], str],
    length: Callable[[Row], float],
    uniform_until: int | None = None,
    domain_weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Selection:
    """`count` rows, or all that are left where these are fewer. The same rows for one seed, in whatever order they come.

    broken, defective: rows that go.   trusted: rows that are taken without further steps, all of them.   solved: whether a model
    already solves the row.   domain, length: of a row; length is that of the trace in any unit.
    uniform_until: rows, those taken at once included, up to which domains are drawn uniformly; from then on with
        `domain_weights`, domain -> weight, without which that is not possible. None is uniform throughout.
    Raises ValueError for arguments that contradict each other, more trusted rows than `count`, and rows that are there twice.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if (uniform_until is None) != (domain_weights is None):
        raise ValueError(
            "uniform_until and domain_weights go together: up to which row domains are uniform, and what holds then"
        )
    if uniform_until is not None and not 0 <= uniform_until <= count:
        raise ValueError(f"uniform_until must be from 0 to count={count}, not {uniform_until}")
    if any(not 0 <= weight < math.inf for weight in (domain_weights or {}).values()):
        raise ValueError("domain_weights must be at least 0 and finite")
    counts = {"rows": len(rows)}
    left = [row for row in rows if not broken(row)]
    counts["without errors"] = len(left)
    left = [row for row in left if not defective(row)]
    counts["without defects"] = len(left)
    taken = [row for row in left if trusted(row)]
    counts["taken at once"] = len(taken)
    if len(taken) > count:
        raise ValueError(f"{len(taken)} rows are trusted, more than the {count} wanted; trust fewer, or want more")
    pool = [row for row in left if not trusted(row) and not solved(row)]
    counts["difficult"] = len(pool)
    ranked = _by_domain(pool, domain, length)
    counts["domains"] = len(ranked)
    drawn: list[Row] = []
    draw = random.Random(seed)
    while ranked and len(taken) + len(drawn) < count:
        names = sorted(ranked)
        weights = [1.0] * len(names)
        if uniform_until is not None and len(taken) + len(drawn) >= uniform_until:
            assert domain_weights is not None
            weights = [domain_weights.get(name, 0.0) for name in names]
            if not any(weights):
                break
        (name,) = draw.choices(names, weights)
        drawn.append(ranked[name].pop(_rank(draw, len(ranked[name]))))
        if not ranked[name]:
            del ranked[name]
    counts["selected"] = len(taken) + len(drawn)
    selected = [{**row, STEP: "quality"} for row in taken] + [{**row, STEP: "diversity"} for row in drawn]
    return Selection(selected, counts)


def _by_domain(
    rows: Sequence[Row], domain: Callable[[Row], str], length: Callable[[Row], float]
) -> dict[str, list[Row]]:
    """The rows of each domain, the longest first; rows of equal length in an order that is theirs and not that of the file."""
    found: dict[str, list[tuple[float, str, Row]]] = {}
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        content = {name: value for name, value in row.items() if name != NUMBER}
        key = hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
        number = row.get(NUMBER, number)
        if key in seen:
            raise ValueError(f"rows {seen[key]} and {number} are the same; leave one out")
        seen[key] = number
        found.setdefault(domain(row), []).append((-length(row), key, row))
    return {name: [row for *_, row in sorted(group, key=lambda item: item[:2])] for name, group in found.items()}


def _rank(draw: random.Random, rows: int) -> int:
    """A rank below `rows`, with weight 2^-rank: how many coins fall on heads before the first tail."""
    while True:
        rank = 0
        while rank < rows and draw.random() < 0.5:
            rank += 1
        if rank < rows:
            return rank


def defect(texts: Iterable[str], patterns: Mapping[str, str] = DEFECTS) -> str | None:
    """The name of the first defect that one of the texts has."""
    return next(
        (name for text in texts for name, found in _compiled(tuple(patterns.items())) if found.search(text)), None
    )


@functools.cache
def _compiled(patterns: tuple[tuple[str, str], ...]) -> list[tuple[str, re.Pattern[str]]]:
    found = []
    for name, pattern in patterns:
        try:
            found.append((name, re.compile(pattern, re.IGNORECASE | re.MULTILINE)))
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    return found


@dataclass(frozen=True)
class SelectS1K:
    """Select a small training set of reasoning by quality, difficulty and diversity, as s1K was.

    The rows hold question, trace (the reasoning), domain and solved_by (the models that solve the question, a list or names
    between commas); where they have them length (of the trace), source, correct and error, too.
    """

    data: str
    """Rows with traces: Hub id, local .jsonl, .json or .parquet file or folder"""
    output: str
    """File for the rows that are selected, .jsonl or .parquet"""
    count: int = 1000
    """Rows to select, those of trusted sources included"""
    trust: tuple[str, ...] = ()
    """Sources whose correct rows are taken at once, SOURCE, or SOURCE:LENGTH for those with a longer trace"""
    solvers: tuple[str, ...] = ()
    """Models whose solved questions are too easy; without it any model in solved_by"""
    defect: tuple[str, ...] = ()
    """Further patterns (regular expressions) of defects in question or trace"""
    keep_defects: bool = False
    """Look for the patterns of --defect only, not for images, drawings in characters and dangling references"""
    uniform_until: int | None = None
    """Rows up to which domains are drawn uniformly, then by --domain-weights; without it uniformly throughout"""
    domain_weights: str | None = None
    """JSON file, domain to weight, such as the number of benchmark questions of each domain"""
    seed: int = 0
    """Of the draws"""
    columns: str = ""
    """Columns under other names, ours first: question=problem,trace=reasoning"""
    split: str | None = None
    """Split of the data; without it train, or all there is"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Writes the rows that are selected and returns how many each step left."""
        from trialist.data.corpora import load_rows, parse_columns
        from trialist.data.preference_files import check_rows_output, write_rows

        output = check_rows_output(self.output)
        weights = None if self.domain_weights is None else read_weights(self.domain_weights)
        patterns = {} if self.keep_defects else dict(DEFECTS)
        patterns |= {f"the pattern {pattern}": pattern for pattern in self.defect}
        _compiled(tuple(patterns.items()))
        trusted = dict(_source_and_length(source) for source in self.trust)
        table = load_rows(self.data, required=("question",), columns=parse_columns(self.columns), split=self.split)
        needed = ("trace", "domain", "solved_by", *(("source", "correct") if trusted else ()))
        if missing := [name for name in needed if name not in table.column_names]:
            raise ValueError(
                f"{self.data}: expected the columns {', '.join(missing)}, found {', '.join(table.column_names)}; name them with "
                f"--columns {missing[0]}=..."
            )
        numbered = [{**row, NUMBER: number} for number, row in enumerate(table.to_list(), start=1)]
        found = select_s1k(
            numbered, count=self.count, broken=broken, uniform_until=self.uniform_until, domain_weights=weights, seed=self.seed,
            defective=lambda row: defect((row["question"], row["trace"]), patterns) is not None,
            trusted=lambda row: _is_trusted(row, trusted), solved=lambda row: _is_solved(row, self.solvers),
            domain=_domain, length=trace_length,
        )  # fmt: skip
        if not found.rows:
            raise ValueError(f"no row is left: {found.counts}; trust more sources, or name fewer --solvers")
        write_rows(({name: value for name, value in row.items() if name != NUMBER} for row in found.rows), output)
        for step, rows in found.counts.items():
            say(f"{step}: {rows:,}")
        if len(found.rows) < self.count:
            say(f"{len(found.rows):,} rows are all there are, fewer than --count {self.count:,}")
        domains = {str(row["domain"]) for row in found.rows}
        return {
            **{step: f"{rows:,}" for step, rows in found.counts.items()},
            "domains selected": f"{len(domains):,}",
            "mean trace length": f"{sum(map(trace_length, found.rows)) / len(found.rows):,.0f}",
            "data": str(output),
        }


NUMBER = "\0row"
"""Key of a row's number, for messages"""


def read_weights(file: str) -> dict[str, float]:
    """Domain -> weight, from a JSON file. Raises FileNotFoundError, and ValueError for anything but numbers by name."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--domain-weights {file}: no such file")
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--domain-weights {file}: no JSON: {error}") from error
    if not isinstance(weights, dict) or not weights or not all(_is_number(value) for value in weights.values()):
        raise ValueError(
            f'--domain-weights {file}: expected an object of numbers by domain, such as {{"geometry": 12}}'
        )
    return weights


def broken(row: Row) -> bool:
    """Whether the row says that it is an error, or has no question or trace."""
    return bool(row.get("error")) or not all(str(row.get(name) or "").strip() for name in ("question", "trace"))


def trace_length(row: Row) -> float:
    """The row's own length, else the words of its trace."""
    length = row.get("length")
    if length is None:
        return float(len(str(row["trace"]).split()))
    if not _is_number(length):
        raise ValueError(f"{_place(row)}'length' is {length!r}; it must be a number")
    return float(length)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _place(row: Row) -> str:
    return f"row {row[NUMBER]}: " if NUMBER in row else ""


def _domain(row: Row) -> str:
    if row["domain"] is None or not str(row["domain"]).strip():
        raise ValueError(
            f"{_place(row)}'domain' is missing; label the row, for example by a classification of subjects"
        )
    return str(row["domain"])


def _is_solved(row: Row, solvers: Sequence[str]) -> bool:
    names = row["solved_by"]
    if names is None:
        raise ValueError(f"{_place(row)}'solved_by' is missing; an empty list or string means that no model solves it")
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    if not isinstance(names, list):
        raise ValueError(f"{_place(row)}'solved_by' is {names!r}; give a list of models, or their names between commas")
    return bool(set(names) & set(solvers) if solvers else names)


def _source_and_length(text: str) -> tuple[str, float]:
    """`SOURCE` or `SOURCE:LENGTH`."""
    source, colon, length = text.rpartition(":")
    if not colon:
        return text, -math.inf
    try:
        return source, float(length)
    except ValueError:
        raise ValueError(f"--trust {text}: SOURCE, or SOURCE:LENGTH with a number") from None


def _is_trusted(row: Row, trusted: Mapping[str, float]) -> bool:
    source = str(row.get("source"))
    return source in trusted and bool(row.get("correct")) and trace_length(row) > trusted[source]
