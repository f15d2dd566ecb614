"""A paired verdict on two runs in the ledger, over the items that both have scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trialist.engine.contract import Endpoint, Items
from trialist.engine.ledger import Ledger
from trialist.engine.pairs import compare_items
from trialist.engine.plan import rebuild
from trialist.engine.records import RunRecord


def compare_runs(
    ledger_path: Path,
    a: str,
    b: str,
    *,
    metric: str | None = None,
    better: Literal["higher", "lower"] | None = None,
    margin: float | None = None,
) -> dict[str, Any]:
    """The effect of run `b` against the control `a`, paired by item, with its interval; with a margin also a verdict.

    a, b: ids of finished runs, or the beginnings of them. metric: by default the one that both store first. better: by
    default what the run's evaluation or trial says of the metric. Clusters are those that the items were stored with.
    Raises ValueError for runs that do not exist, have not finished, or have scored other items.
    """
    ledger = Ledger(ledger_path, create=False)
    try:
        rows = [ledger.row(name) for name in (a, b)]
        records = ledger.records([row["id"] for row in rows])
        configurations = [
            next(c for c in ledger.configurations(row["trial"]) if c.key == row["configuration"]) for row in rows
        ]
    finally:
        ledger.close()
    for row, record in zip(rows, records):
        if record.outcome is None:
            raise ValueError(f"run {record.id} is {record.status}: it has no outcome to compare")
        if not record.outcome.items:
            raise ValueError(
                f"run {record.id} ({row['trial']} · {row['setting']} · {row['arm']}) stores no score per item, so there "
                "is nothing to pair; its trial compares it with the other arms"
            )
    name = _metric(records, metric)
    found = [_items(record, name) for record in records]
    direction = better or _direction(rebuild(configurations[1], ledger_path).endpoints(), name)
    remarks = []
    if rows[0]["trial"] == rows[1]["trial"]:
        differing = _differences(configurations[0].inputs, configurations[1].inputs)
        if differing:
            remarks.append(f"The runs differ in {', '.join(differing)}: the effect is that of all of it together.")
    try:
        result = compare_items(found[0], found[1], metric=name, better=direction, margin=margin, remarks=remarks)
    except ValueError as error:
        raise ValueError(
            f"runs {records[0].id} and {records[1].id} were not scored on the same items: {error}"
        ) from error
    return {
        "a": _label(records[0]),
        "b": _label(records[1]),
        "filter": None,
        "id_field": "item",
        "cluster_field": None if found[0].clusters is None else "document or prompt",
        **result,
    }


def _metric(records: list[RunRecord], metric: str | None) -> str:
    stored = [list(record.outcome.items) if record.outcome else [] for record in records]
    common = [name for name in stored[0] if name in stored[1]]
    if metric is None and common:
        return common[0]
    if metric not in common:
        have = "; ".join(f"{record.id} has {', '.join(names)}" for record, names in zip(records, stored))
        raise ValueError(
            f"no metric {metric!r} per item in both runs: {have}" if metric else f"no metric in common: {have}"
        )
    return metric


def _items(record: RunRecord, name: str) -> Items:
    assert record.outcome is not None
    return record.outcome.items[name]


def _direction(endpoints: tuple[Endpoint, ...], name: str) -> Literal["higher", "lower"]:
    for endpoint in endpoints:
        if endpoint.name == name:
            return endpoint.better
    raise ValueError(f"say which direction of {name!r} is better: --better higher or --better lower")


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = [name for name in before if name != "model" and before[name] != after.get(name)]
    return [f"{name} ({before[name]} and {after.get(name)})" for name in names]


def _label(record: RunRecord) -> str:
    return f"run {record.id}: {record.arm} on {record.setting}, seed {record.seed}"
