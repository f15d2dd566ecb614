"""`trialist show NAME`: what a trial claims, compares, holds equal and measures, and how to use its part alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from trialist.cli._arguments import console, parse, print_json
from trialist.engine.contract import Trial
from trialist.engine.plan import choose_preset, preset_fields, presets_of
from trialist.engine.registry import load_trial


@dataclass(frozen=True)
class Options:
    """One trial: claim, reported numbers, arms, budget, presets, how to use the part alone."""

    name: Annotated[str, tyro.conf.Positional]
    """Name of the trial"""
    preset: str | None = None
    """Show the arms of this preset"""
    json: bool = False
    """Print JSON"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "show", arguments)
    cls = load_trial(options.name)
    preset = choose_preset(options.name, cls, options.preset)
    trial = cls(**preset_fields(cls, preset))
    claim = trial.claim
    document: dict[str, Any] = {
        "name": options.name,
        "question": (cls.__doc__ or "").strip(),
        "claim": dataclasses.asdict(claim),
        "replicate": trial.replicates_over(),
        "budget": dataclasses.asdict(trial.budget),
        "tuning": dataclasses.asdict(trial.tuning) if trial.tuning else None,
        "arms": [dataclasses.asdict(arm) for arm in trial.arms()],
        "presets": {name: dict(entry) for name, entry in presets_of(cls).items()},
        "preset": preset,
        "usage": trial.usage,
        "path": f"{cls.__module__}:{cls.__name__}",
    }
    if options.json:
        print_json(document)
        return 0
    out = console()
    out.print(f"[bold]{options.name}[/bold]: {document['question']}")
    out.print(
        f"\n[bold]Claim[/bold]    {claim.statement}\n[bold]Source[/bold]   {claim.source}\n[bold]Reported[/bold] {claim.reported}"
    )
    for kind, endpoints in (
        ("Endpoint", (claim.endpoint, *claim.co_primary)),
        ("Guard", claim.guards),
        ("Also", claim.secondary),
    ):
        for endpoint in endpoints:
            margin = f", margin {endpoint.margin:g}" if endpoint.margin else ""
            unit = f" in {endpoint.unit}" if endpoint.unit else ""
            out.print(f"[bold]{kind:<9}[/bold]{endpoint.name}{unit}, {endpoint.better} is better{margin}")
    out.print(f"[bold]Equal[/bold]    {held_equal(trial)}")
    if trial.tuning:
        out.print(
            f"[bold]Tuning[/bold]   {trial.tuning.tries} tries an arm on {trial.tuning.metric.name}, seeds {trial.tuning.seeds}"
        )
    out.print(f"\n[bold]Arms[/bold] (preset {preset})")
    for arm in trial.arms():
        null = ", null: here the benefit must vanish" if arm.null else ""
        out.print(f"  {arm.setting} · {arm.name} ({arm.role}{null}) {arm.about}", markup=False)
    out.print("\n[bold]Presets[/bold]")
    for name, entry in presets_of(cls).items():
        fields = ", ".join(f"{key}={value}" for key, value in entry.items() if key != "about")
        out.print(f"  {name}: {entry.get('about', '')} ({fields})", markup=False)
    if trial.usage:
        out.print("\n[bold]The part alone[/bold]")
        out.print("\n".join("  " + line for line in trial.usage.strip().splitlines()), markup=False)
    out.print(f"\ntrialist run {options.name} --help shows all options.")
    return 0


def held_equal(trial: Trial) -> str:
    """The budget in words: of each setting that has one of its own, and of the cells of a grid, which differ in theirs."""
    budget, arms = trial.budget, list(trial.arms())
    if all(arm.role == "factor" for arm in arms):
        return f"nothing over all cells of the grid; {budget.unit} are measured, and each cell says under which rule it stands"
    own = "".join(f"; {unit} in {setting}" for setting, unit in budget.settings.items())
    return f"{budget.unit}{own} (measured), tolerance {budget.tolerance:.0%}"
