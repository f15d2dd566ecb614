"""`trialist plan NAME`: what a trial would take on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from trialist.cli._arguments import console, parse_trial, print_json
from trialist.engine.display import duration


def main(arguments: Sequence[str]) -> int:
    arguments = list(arguments)
    as_json = "--json" in arguments
    name, fields, options = parse_trial("plan", [argument for argument in arguments if argument != "--json"])
    from trialist.engine.estimate import estimate
    from trialist.engine.plan import prepare

    prepared = prepare(name, fields, options)
    progress = Console(stderr=True)
    progress.print("timing the first steps of every arm ...", highlight=False)
    plan = estimate(prepared, lambda text: progress.print(text, highlight=False))
    if as_json:
        print_json(plan)
        return 0
    out = console()
    arms = ", ".join(dict.fromkeys(arm["arm"] for arm in plan["arms"]))
    settings = ", ".join(dict.fromkeys(arm["setting"] + (" (null)" if arm["null"] else "") for arm in plan["arms"]))
    rows = [
        ("arms", arms),
        ("settings", settings),
        ("replicates", f"{plan['replicate']}: {len(plan['seeds'])} seeds"),
        ("runs", f"{plan['runs']}, {plan['runs_finished']} of them in the ledger; {plan['workers']} at a time"),
        ("tuning", f"{plan['tuning_runs']} runs" if plan["tuning_runs"] else "none to do"),
        ("time", _time(plan)),
        ("memory", f"{plan['peak_memory_gib']:.1f} GiB" if plan["peak_memory_gib"] else "unknown"),
        ("disk", f"{plan['disk_free_gib']:.0f} GiB free; stages there: {', '.join(plan['stages']) or 'none'}"),
        ("detectable", _detectable(plan)),
    ]
    for key, value in rows:
        out.print(f"[bold]{key:<12}[/bold]", end="")
        out.print(value, markup=False)
    for remark in plan["remarks"]:
        out.print(remark, markup=False)
    return 0


def _time(plan: dict) -> str:
    if plan["minutes"] is None:
        return "unknown: no run reported progress in time"
    total = plan["minutes"] + (plan["tuning_minutes"] or 0.0)
    text = f"about {duration(total * 60) or '0 s'}"
    return text + (f", {duration(plan['tuning_minutes'] * 60)} of it tuning" if plan["tuning_minutes"] else "")


def _detectable(plan: dict) -> str:
    if plan["detectable_in_sd"] is None:
        return "no verdict from fewer than 3 replicates"
    margin = f"the margin is {plan['margin']:g}" if plan["margin"] else "no margin"
    if plan["detectable_effect"] is None:
        return (
            f"{plan['detectable_in_sd']:.2f} standard deviations of the difference between arms (80 % power); {margin}; "
            "earlier runs will tell the standard deviation"
        )
    verdict = (
        "enough"
        if plan["margin"] and plan["detectable_effect"] <= plan["margin"]
        else "larger than the margin: take more seeds"
    )
    return f"{plan['detectable_effect']:.3g} in {plan['endpoint']} (80 % power, spread of earlier runs); {margin}: {verdict}"
