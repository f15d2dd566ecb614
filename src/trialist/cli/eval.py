"""`trialist eval NAME ... --model M`: scores of a model on benchmarks, item by item, in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from trialist.cli._arguments import console, ledger_path, parse, print_json
from trialist.trials._evaluation import NAME, OPTIONS, PATH, EvaluationOptions, ModelEvaluation

USER_ERRORS = ("ValueError: ", "FileNotFoundError: ", "ImportError: ")


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Score a model on benchmarks: bits per byte of any text, BLiMP, and standard benchmarks through lm-eval. Without names,
    list them. `trialist compare RUN RUN` compares two evaluations by item."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Benchmarks, also separated by commas: hellaswag, text:FILE, blimp:FOLDER"""
    model: str | None = None
    """Hub id, local folder or asset of a causal language model"""
    num_steps: str | None = None
    """Steps of a model with recurrent depth; several, as in 1,2,4,8, are compared, with the FLOPs of each; without it those of
    its configuration"""
    seed: int = 0
    """Draws few-shot examples where they are drawn"""
    again: bool = False
    """Run once more what the ledger holds already, as a further run"""
    ledger: str | None = None
    """The ledger file; without it .trialist/ledger.db below the current folder, or below TRIALIST_HOME"""
    json: bool = False
    """Print metrics as JSON"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "eval", arguments)
    names = [part for name in options.names for part in name.split(",") if part]
    if not names:
        return list_benchmarks(options.json)
    if options.model is None:
        raise ValueError(f"which model? trialist eval {' '.join(names)} --model MODEL (Hub id, local folder or asset)")
    from rich.console import Console

    from trialist.engine.alone import run_alone
    from trialist.engine.api import command_line
    from trialist.engine.display import Display
    from trialist.evaluation.registry import options_for

    given = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    loading = {name: getattr(options, name) for name in ("batch", "device", "dtype")}
    trials = [
        ModelEvaluation(model=options.model, benchmark=name, num_steps=steps, **loading, **own)
        for name, own in options_for(names, given).items()
        for steps in step_numbers(options.num_steps)
    ]
    records = run_alone(
        NAME, PATH, trials, seed=options.seed, ledger_path=ledger_path(options.ledger), command=command_line(),
        again=options.again, display=Display(Console(stderr=True)),
    )  # fmt: skip
    results = [describe(record, trial) for record, trial in zip(records, trials)]
    if options.json:
        print_json({"model": options.model, "evaluations": results})
    else:
        print_results(results)
    failed = [record for record in records if record.outcome is None]
    for record in failed:
        message = str(record.error)
        if message.startswith(USER_ERRORS):
            raise ValueError(f"{record.setting}: {message.partition(': ')[2]}")
        console().print(
            f"\nrun {record.id} ({record.setting}) failed: {message}; `trialist runs --status failed --errors` shows where, "
            "the same command tries again",
            markup=False,
        )
    return 1 if failed else 0


def step_numbers(text: str | None) -> list[int | None]:
    """`1,2,4` as numbers; one None where nothing is said."""
    if text is None:
        return [None]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--num-steps {text!r}: whole numbers of at least 1, separated by commas, such as 1,2,4,8")
    return [int(part) for part in dict.fromkeys(parts)]


def list_benchmarks(as_json: bool) -> int:
    from trialist.evaluation.registry import evaluation_names

    names = evaluation_names()
    if as_json:
        print_json([{"name": name, "about": about} for name, about in names.items()])
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, about in names.items():
        table.add_row(name, about)
    out = console()
    out.print(table)
    out.print(
        "\ntrialist eval NAME ... --model MODEL\nAll but text and blimp need pip install 'trialist[eval]' and the data: "
        "trialist assets fetch benchmarks",
        markup=False,
    )
    return 0


def describe(record: Any, trial: ModelEvaluation) -> dict[str, Any]:
    """What is printed of a run: metrics, the interval of the deciding one over items, run id; with recurrent depth its steps
    and the FLOPs of a token."""
    endpoints = trial.endpoints()
    found: dict[str, Any] = {
        "benchmark": record.setting, "run": record.id, "status": record.status, "seed": record.seed, "metrics": {},
        "items": 0, "interval": None, "tokens": None, "seconds": record.measured.get("wall_seconds"), "notes": [],
        "units": {endpoint.name: endpoint.unit for endpoint in endpoints}, "error": record.error,
        "num_steps": trial.num_steps, "flops_per_token": None,
    }  # fmt: skip
    if record.outcome is None:
        return found
    from trialist.engine.item_intervals import item_interval

    name = endpoints[0].name
    items = record.outcome.items[name]
    interval = item_interval(items.scores, items.clusters)
    cost = record.outcome.cost
    return found | {
        "flops_per_token": cost.flops / cost.tokens if cost.flops and cost.tokens else None,
        "metrics": dict(record.outcome.metrics),
        "items": len(items.ids),
        "interval": None if interval.low is None else {"metric": name, "low": interval.low, "high": interval.high},
        "tokens": record.outcome.cost.tokens,
        "notes": list(record.outcome.notes),
    }


def print_results(results: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from trialist.engine.display import duration

    out = console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    deep = any(result["num_steps"] for result in results)
    depth = ("steps", "FLOPs a token") if deep else ()
    for column in ("benchmark", *depth, "metric", "value", "95 % interval", "items", "time", "run"):
        text = column in ("benchmark", "metric", "95 % interval", "run")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    parts: dict[str, list[tuple[str, float]]] = {}
    for result in results:
        head = True
        for name, value in result["metrics"].items():
            if "/" in name:
                steps = f" at {result['num_steps']} steps" if deep else ""
                parts.setdefault(f"{result['benchmark']}{steps}", []).append((name, value))
                continue
            interval = result["interval"] if result["interval"] and result["interval"]["metric"] == name else None
            table.add_row(
                result["benchmark"] if head else "",
                *(
                    (str(result["num_steps"]), _count(result["flops_per_token"]))
                    if deep and head
                    else ("",) * len(depth)
                ),
                name + (f", {unit}" if (unit := result["units"].get(name)) and unit != name else ""),
                number(value),
                f"{number(interval['low'])} to {number(interval['high'])}" if interval else "",
                f"{result['items']:,}" if head else "",
                duration(result["seconds"]) if head else "",
                result["run"] if head else "",
            )
            head = False
    if table.row_count:
        out.print(table)
    for benchmark, rows in parts.items():
        detail = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        detail.add_column(benchmark)
        detail.add_column(rows[0][0].partition("/")[0], justify="right")
        for name, value in rows:
            detail.add_row(name.partition("/")[2], number(value))
        out.print()
        out.print(detail)
    for note in dict.fromkeys(note for result in results for note in result["notes"]):
        out.print(f"note  {note}", markup=False)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
