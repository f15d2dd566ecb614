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

from trialist.engine import wording
from trialist.engine.contract import Endpoint, Items

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
SHOWN_FLIPS = 5


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
    from trialist.engine.contrasts import contrast_items
    from trialist.engine.rules import LEAST_REPLICATES, Evidence, word_for

    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', not {better!r}")
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin must be > 0, not {margin}; leave it out for effect and interval alone")
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

    endpoint = Endpoint(metric, better=better, margin=margin)
    contrast = contrast_items(Items(ids, scores[0], clusters), Items(ids, scores[1], clusters), endpoint, "A")
    effect = contrast.effect()
    word = None
    if margin is not None and effect.n >= LEAST_REPLICATES:
        word = word_for(Evidence(((contrast,),))).word
    sign = 1 if better == "higher" else -1
    gains = {item: sign * (second - first) for item, first, second in zip(ids, *scores)}
    binary = all(score in (0.0, 1.0) for side in scores for score in side)
    won, lost = sum(gain > 0 for gain in gains.values()), sum(gain < 0 for gain in gains.values())
    if binary and cluster is not None:
        remarks.append("McNemar's test takes the items as independent and knows nothing of the clusters.")
    units = "clusters of items" if cluster else "items"
    if effect.n < LEAST_REPLICATES:
        remarks.append(f"{effect.n} {units} are too few: no verdict below {LEAST_REPLICATES}.")
    if contrast.repeated:
        remarks.append(f"{contrast.repeated} replicates equal another bit for bit and were left out.")
    ordered = sorted(ids, key=lambda item: (-abs(gains[item]), item))
    before, after = dict(zip(ids, scores[0])), dict(zip(ids, scores[1]))

    def largest(direction: int) -> list[dict[str, Any]]:
        chosen = [item for item in ordered if direction * gains[item] > 0][:SHOWN_FLIPS]
        return [{"id": item, "a": before[item], "b": after[item]} for item in chosen]

    return {
        "a": str(a),
        "b": str(b),
        "metric": metric,
        "filter": chosen_filter,
        "better": better,
        "margin": margin,
        "id_field": id_field,
        "cluster_field": cluster,
        "items": len(ids),
        "clusters": None if clusters is None else len(set(clusters)),
        "mean_a": sum(scores[0]) / len(ids),
        "mean_b": sum(scores[1]) / len(ids),
        "effect": effect.effect,
        "low": effect.low,
        "high": effect.high,
        "low90": effect.low90,
        "high90": effect.high90,
        "n": effect.n,
        "method": effect.method,
        "correlation": effect.correlation,
        "reason": effect.reason,
        "verdict": word,
        "won": won,
        "lost": lost,
        "tied": len(ids) - won - lost,
        "mcnemar_p": _mcnemar(won, lost) if binary else None,
        "flips": {"won": largest(1), "lost": largest(-1)},
        "remarks": remarks,
    }


def render_comparison(result: Mapping[str, Any]) -> str:
    """The result of `compare_files` as text for a terminal."""
    spread = wording.interval(result)
    places = max(wording.effect_decimals(result), wording.decimals(result["mean_a"], result["mean_b"]))
    unit = result["metric"] + (f",{result['filter']}" if result["filter"] else "")
    lines = []
    if result["verdict"] is not None:
        word = result["verdict"]
        margin = wording.margin_text(result["margin"])
        lines.append(f"{wording.SYMBOLS[word]} {word}: {_sentence(result)} (margin {margin})")
    else:
        lines.append(_sentence(result))
    effect = f"{wording.signed(result['effect'], wording.effect_decimals(result))} {spread}".rstrip()
    reason = f": {result['reason']}" if result["reason"] else ""
    grouped = f", in {result['clusters']:,} clusters by {result['cluster_field']}" if result["cluster_field"] else ""
    p = result["mcnemar_p"]
    lines += [
        "",
        f"control A    {wording.plain(result['mean_a'], places)}   {result['a']}",
        f"treatment B  {wording.plain(result['mean_b'], places)}   {result['b']}",
        f"effect       {effect}   {unit}, positive means B is better",
        f"interval     {result['method']}{reason}",
        f"items        {result['items']:,}, by {result['id_field']}{grouped}",
        f"flips        B better on {result['won']:,}, worse on {result['lost']:,}, equal on {result['tied']:,}"
        + (f"; McNemar exact p {p:.3g}" if p is not None else ""),
    ]
    for name, title in (("won", "B gained"), ("lost", "B lost")):
        if result["flips"][name]:
            shown = ", ".join(f"{flip['id']} ({flip['a']:g} to {flip['b']:g})" for flip in result["flips"][name])
            lines.append(f"{title:<12} {shown}" + (" …" if result[name] > SHOWN_FLIPS else ""))
    if result["margin"] is None:
        lines.append("verdict      none: without --margin nothing says which difference is worth having")
    lines += [f"note         {remark}" for remark in result["remarks"]]
    return "\n".join(lines)


def _sentence(result: Mapping[str, Any]) -> str:
    over = f"over {result['items']:,} items"
    if result["effect"] is None:
        return f"no effect can be given {over}: {result['reason']}"
    places = wording.effect_decimals(result)
    size = f"{abs(result['effect']):.{places}f}"
    how = (
        "equal to"
        if float(size) == 0
        else f"better by {size} than"
        if result["effect"] > 0
        else f"worse by {size} than"
    )
    between = f", 95 % interval {wording.interval(result)}" if result["low"] is not None else ", without an interval"
    return f"B is {how} A in {result['metric']} {over}{between}"


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


def _mcnemar(won: int, lost: int) -> float | None:
    """Exact two-sided p value for the discordant pairs; None where there is none."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else None
