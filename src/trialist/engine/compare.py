"""A paired verdict on two result files that exist already: lm-eval sample logs, or JSON lines with item id and score.

The first file is the control. Both must hold the same items; nothing is left out to make them fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trialist.engine.contract import Items

ID_FIELDS = (
    "doc_id",
    "item_id",
    "id",
    "example_id",
    "sample_id",
    "question_id",
    "prompt_id",
    "task_id",
    "uid",
    "idx",
    "index",
)
"""Fields that can name an item"""
NO_SCORES = {*ID_FIELDS, "seed", "filter", "resps", "filtered_resps", "target", "line"}


@dataclass(frozen=True)
class _Row:
    line: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class _File:
    path: Path
    rows: tuple[_Row, ...]

    def where(self, row: _Row) -> str:
        return f"{self.path} line {row.line}"

    def fields(self) -> list[str]:
        """Fields that every row has."""
        common = [name for name in self.rows[0].fields if all(name in row.fields for row in self.rows)]
        return [name for name in common if name != "doc" or not isinstance(self.rows[0].fields[name], Mapping)]


def compare_files(
    a: str | Path,
    b: str | Path,
    *,
    metric: str | None = None,
    better: Literal["higher", "lower"] = "higher",
    margin: float | None = None,
    cluster: str | None = None,
) -> dict[str, Any]:
    """The effect of `b` against the control `a`, paired by item, with its interval; with a margin also a verdict.

    metric: field of the score, `NAME,FILTER` where an lm-eval log holds several filters; by default the only one.
    cluster: field (`doc.passage` reaches into objects) whose equal values mark items that are not independent.
    Effects are oriented: positive means that `b` is better. Raises FileNotFoundError, or ValueError that names file
    and line.
    """
    from trialist.engine.pairs import check_question, compare_items

    check_question(better, margin)
    files = [_read(a), _read(b)]
    metric, chosen_filter, files = _choose_metric(files, metric, cluster)
    id_field = _choose_id(files)
    rows = [_by_id(file, id_field) for file in files]
    _same_items(files, rows)
    remarks = _same_content(files, rows)
    ids = tuple(rows[0])
    scores = [tuple(_score(file, by_id[item], metric) for item in ids) for file, by_id in zip(files, rows)]
    clusters = (
        None if cluster is None else tuple(_cluster(files, [by_id[item] for by_id in rows], cluster) for item in ids)
    )
    paired = compare_items(
        Items(ids, scores[0], clusters), Items(ids, scores[1], clusters), metric=metric, better=better, margin=margin,
        remarks=remarks,
    )  # fmt: skip
    return {"a": str(a), "b": str(b), "filter": chosen_filter, "id_field": id_field, "cluster_field": cluster, **paired}


def _read(path: str | Path) -> _File:
    path = Path(path)
    if path.is_dir():
        logs = ", ".join(sorted(entry.name for entry in path.glob("*.jsonl"))[:5])
        raise ValueError(f"{path} is a folder; name one file of it{': ' + logs if logs else ''}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; pass a JSON-lines file, for example an lm-eval samples_*.jsonl")
    rows = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    hint = (
                        "; the file looks like one JSON document, write one object per line"
                        if number == 1 and line.strip() in "[{"
                        else ""
                    )
                    raise ValueError(
                        f"{path} line {number}: not JSON ({error.msg} at column {error.colno}){hint}"
                    ) from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path} line {number}: expected a JSON object, found {type(row).__name__}")
                rows.append(_Row(number, row))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); pass a JSON-lines file") from error
    if not rows:
        raise ValueError(f"{path} holds no rows; pass a file with one JSON object per line")
    return _File(path, tuple(rows))


def _reach(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field; `doc.passage` reaches into an object. Raises KeyError."""
    if field in row:
        return row[field]
    head, dot, rest = field.partition(".")
    if dot and isinstance(row.get(head), Mapping):
        return _reach(row[head], rest)
    raise KeyError(field)


def _choose_metric(
    files: Sequence[_File], metric: str | None, cluster: str | None
) -> tuple[str, str | None, list[_File]]:
    """The score's field, the filter of an lm-eval log, and the files with the rows of that filter alone."""
    name, _, wanted = (metric or "").partition(",")
    filters = sorted({str(row.fields["filter"]) for file in files for row in file.rows if "filter" in row.fields})
    if metric and wanted and wanted not in filters:
        raise ValueError(
            f"metric {metric!r}: no filter {wanted!r}; the files hold {', '.join(filters) or 'no filters'}"
        )
    if len(filters) > 1 and not wanted:
        examples = ", ".join(f"{name or 'METRIC'},{entry}" for entry in filters)
        raise ValueError(f"the files hold several filters of every item; choose one with --metric: {examples}")
    wanted = wanted or (filters[0] if filters else "")
    kept = []
    for file in files:
        rows = tuple(row for row in file.rows if not filters or str(row.fields.get("filter")) == wanted)
        if not rows:
            raise ValueError(f"{file.path} holds no row of filter {wanted!r}")
        kept.append(_File(file.path, rows))
    if not name:
        candidates = [
            field for field in kept[0].fields() if all(_is_score(file, field) for file in kept) and field != cluster
        ]
        declared = kept[0].rows[0].fields.get("metrics")
        if isinstance(declared, list):  # lm-eval lists its metrics in every row
            candidates = [field for field in candidates if field in declared]
        if len(candidates) != 1:
            found = (
                f"{', '.join(candidates)} could all be" if candidates else f"none of {', '.join(kept[0].fields())} is"
            )
            raise ValueError(f"{found} the score, a number in every row of both files; choose one with --metric")
        name = candidates[0]
    return name, wanted or None, kept


def _is_score(file: _File, field: str) -> bool:
    if field in NO_SCORES:
        return False
    return all(isinstance(row.fields.get(field), (int, float)) for row in file.rows)


def _choose_id(files: Sequence[_File]) -> str:
    """The field that names the item in both files: the only known one, or the only one whose values do not repeat."""
    present = [field for field in ID_FIELDS if all(field in file.fields() for file in files)]
    if not present:
        both = [field for field in files[0].fields() if field in files[1].fields()]
        raise ValueError(
            f"no field names the item: expected one of {', '.join(ID_FIELDS)} in every row of both files, "
            f"found {', '.join(both) or 'no field in common'}"
        )
    if len(present) > 1:
        unique = [
            field for field in present if all(len({str(r.fields[field]) for r in f.rows}) == len(f.rows) for f in files)
        ]
        if len(unique) != 1:
            raise ValueError(f"{', '.join(present)} could all name the item; keep one of them and rename the others")
        return unique[0]
    return present[0]


def _unique(file: _File, field: str) -> bool:
    return len({str(row.fields[field]) for row in file.rows}) == len(file.rows)


def _by_id(file: _File, field: str) -> dict[str, _Row]:
    found: dict[str, _Row] = {}
    for row in file.rows:
        value = row.fields[field]
        if value is None or isinstance(value, (list, dict)):
            raise ValueError(f"{file.where(row)}: {field} is {value!r}; an item is named by a number or a string")
        if str(value) in found:
            first = found[str(value)].line
            raise ValueError(
                f"{file.path}: {field} {value!r} stands on lines {first} and {row.line}; every row needs an id of its "
                "own (where an item was sampled several times, number the samples and pass --cluster)"
            )
        found[str(value)] = row
    return found


def _same_items(files: Sequence[_File], rows: Sequence[Mapping[str, _Row]]) -> None:
    missing = [[item for item in rows[1 - side] if item not in rows[side]] for side in (0, 1)]
    if missing[0] or missing[1]:
        parts = [
            f"{len(lost):,} only in {files[1 - side].path} (for example {', '.join(lost[:3])})"
            for side, lost in ((1, missing[1]), (0, missing[0]))
            if lost
        ]
        shared = sum(item in rows[1] for item in rows[0])
        raise ValueError(
            f"the files hold different items: {shared:,} in both, {', '.join(parts)}; score both on the same items"
        )


def _same_content(files: Sequence[_File], rows: Sequence[Mapping[str, _Row]]) -> list[str]:
    """Compares the hashes that lm-eval writes. Other documents or gold are an error, other prompts a remark."""
    remarks = []
    for field, what in (("doc_hash", "document"), ("target_hash", "gold answer"), ("prompt_hash", "prompt")):
        pairs = [(item, row.fields.get(field), rows[1][item].fields.get(field)) for item, row in rows[0].items()]
        differing = [item for item, first, second in pairs if None not in (first, second) and first != second]
        if differing and field == "prompt_hash":
            remarks.append(
                f"The prompt differs on {len(differing):,} of {len(pairs):,} items: "
                "the effect is that of model and prompt together."
            )
        elif differing:
            item = differing[0]
            raise ValueError(
                f"item {item}: the {what} differs ({field} in {files[0].where(rows[0][item])} and "
                f"{files[1].where(rows[1][item])}), as on {len(differing):,} of {len(rows[0]):,} items; "
                "compare runs of the same version of the task"
            )
    return remarks


def _score(file: _File, row: _Row, metric: str) -> float:
    try:
        value = _reach(row.fields, metric)
    except KeyError:
        raise ValueError(f"{file.where(row)}: no field {metric!r}; it has {', '.join(row.fields)}") from None
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{file.where(row)}: {metric} is {value!r}; expected one finite number per item")
    return float(value)


def _cluster(files: Sequence[_File], pair: Sequence[_Row], cluster: str) -> str:
    values = []
    for file, row in zip(files, pair):
        try:
            values.append(_reach(row.fields, cluster))
        except KeyError:
            raise ValueError(
                f"{file.where(row)}: no field {cluster!r} for --cluster; it has {', '.join(row.fields)}"
            ) from None
    if values[0] != values[1]:
        raise ValueError(
            f"{files[0].where(pair[0])} and {files[1].where(pair[1])}: {cluster} is {values[0]!r} and {values[1]!r}; "
            "an item belongs to one cluster"
        )
    return json.dumps(values[0], sort_keys=True)
