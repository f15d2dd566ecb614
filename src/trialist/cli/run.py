"""`trialist run NAME`: run a trial to its verdict."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from trialist.cli._arguments import console, parse_trial

STYLES = {
    "supported": "bold white on green4",
    "small": "bold white on dark_green",
    "no effect": "bold white on grey37",
    "contradicted": "bold white on red3",
    "inconclusive": "bold black on gold3",
    "void": "bold white on magenta",
}


def main(arguments: Sequence[str]) -> int:
    name, fields, options = parse_trial("run", arguments)
    from trialist.engine.api import command_line, conduct
    from trialist.engine.display import Display
    from trialist.engine.plan import prepare

    prepared = prepare(name, fields, options, command=command_line())
    progress = Console(stderr=True)
    confirm = (lambda question: ask(progress, question)) if sys.stdin.isatty() and progress.is_terminal else None
    result = conduct(prepared, display=Display(progress), confirm=confirm)
    if result.verdict is None or result.summary is None:
        return 1 if result.failed else 0
    out = console()
    print_verdict(out, name, prepared.preset, result.summary)
    out.print(f"\nreport    {result.report}", markup=False)
    if result.evidence:
        out.print(f"evidence  {result.evidence}", markup=False)
    if result.summary.get("full_trial_command"):
        out.print(f"\nThis was the demo. The full trial:\n  {result.summary['full_trial_command']}", markup=False)
    if result.failed:
        out.print(
            f"\n{result.failed} runs failed; `trialist runs --status failed --errors` shows why, --retry runs them again",
            markup=False,
        )
    return 1 if result.failed else 0


def ask(progress: Console, question: str) -> bool:
    return progress.input(f"{question}. Go on? [y/N] ").strip().lower() in ("y", "yes")


def print_verdict(out: Console, name: str, preset: str, summary: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from trialist.engine import wording

    word = summary["verdict"]
    out.print(Text.assemble((f" {word.upper()} ", STYLES[word]), f"  {name}, preset {preset}"))
    out.print(f"\n{summary['sentence']}\n{summary['advice']}\n", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("setting", "endpoint", "against", "effect", "95 % interval", "margin", "n"):
        table.add_column(column, justify="left" if column in ("setting", "endpoint", "against") else "right")
    for effect in [
        *summary["effects"],
        *summary["guards"],
        *summary["settings"],
        *summary["null_effects"],
        *summary.get("readings", []),
    ]:
        value, low, high = (effect.get(key) for key in ("effect", "low", "high"))
        places = wording.effect_decimals(effect)
        interval = (
            "undefined" if None in (low, high) else f"{wording.signed(low, places)} to {wording.signed(high, places)}"
        )
        table.add_row(
            str(effect.get("setting", "")),
            str(effect.get("endpoint", summary["endpoint"])),
            effect["control"],
            wording.signed(value, places),
            interval,
            f"{effect['margin']:g}" if effect.get("margin") else "",
            str(effect["n"]),
        )
    out.print(table)
