"""Whether a comparison was fair and complete: what makes a trial void, and what is said as a threat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from trialist.engine.contract import Arm, Budget, Endpoint
from trialist.engine.savings import spent
from trialist.engine.table import Table, items_differ

_ROUNDING = 1e-9


def missing_runs(
    table: Table, expected: Iterable[tuple[str, str, int]], setting: str, deciding: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Runs that are not there: those of the arms that decide (void), and the others (said)."""
    failed = {(run.arm, run.setting, run.seed): run for run in table.failed}
    fatal: list[str] = []
    other: list[str] = []
    for arm, place, seed in expected:
        if (place, arm, seed) in table.runs:
            continue
        run = failed.get((arm, place, seed))
        where = f"{arm}, seed {seed}" + (f" in setting {place}" if place != setting else "")
        why = f"{where} ({(run.error or 'failed').splitlines()[0]})" if run else f"{where} (has not run)"
        (fatal if place == setting and arm in deciding else other).append(why)
    return fatal, other


def unequal_budget(table: Table, setting: str, controls: Sequence[str], treatment: str, budget: Budget) -> str | None:
    """Which control got less than the treatment beyond the tolerance; None where none did."""
    unit = budget.unit_of(setting)
    words = unit.replace("_", " ")
    for control in controls:
        for seed in table.seeds(setting, control, treatment):
            if table.diverged(setting, control, seed) or table.diverged(setting, treatment, seed):
                continue
            mine = spent(table.runs[setting, treatment, seed], unit)
            theirs = spent(table.runs[setting, control, seed], unit)
            if mine is None or theirs is None:
                lacking = " and ".join(arm for arm, cost in ((control, theirs), (treatment, mine)) if cost is None)
                return f"the budget in {words} was not measured: {lacking}, seed {seed} reports none in its Cost"
            if theirs < mine * (1.0 - budget.tolerance) * (1.0 - _ROUNDING):
                return (
                    f"unequal budget: with seed {seed}, {control} got {theirs:,.6g} {words} and {treatment} {mine:,.6g}"
                    f" (a control may get at most {100 * budget.tolerance:g} % less)"
                )
    return None


def different_items(table: Table, setting: str, arms: Sequence[str], endpoints: Sequence[Endpoint]) -> str | None:
    """Which arm or seed was measured on other items than the first; None where all agree."""
    for endpoint in endpoints:
        first = None
        for arm in arms:
            for run in table.of(setting, arm):
                items = run.outcome.items.get(endpoint.name) if run.outcome else None
                if items is None or table.diverged(setting, arm, run.seed):
                    continue
                if first is None:
                    first = (arm, run.seed, items)
                elif reason := items_differ(first[2], items):
                    return (
                        f"different items: {endpoint.name} of {arm}, seed {run.seed} against {first[0]}, "
                        f"seed {first[1]}: "
                        + reason.replace("in the control", "there").replace("in the treatment", "here")
                    )
    return None


def below_floor(table: Table, setting: str, controls: Sequence[str], endpoints: Sequence[Endpoint]) -> str | None:
    """Which control does not reach an endpoint's sanity floor on average; None where all do."""
    for endpoint in endpoints:
        if endpoint.floor is None:
            continue
        for control in controls:
            values = [spent(run, endpoint.name) for run in table.of(setting, control)]
            known = [value for value in values if value is not None]
            if not known:
                continue
            mean = float(np.mean(known))
            if (mean < endpoint.floor) if endpoint.better == "higher" else (mean > endpoint.floor):
                side = "at least" if endpoint.better == "higher" else "at most"
                return (
                    f"{control} fails its sanity floor: mean {endpoint.name.replace('_', ' ')} {mean:.4g}, "
                    f"{side} {endpoint.floor:g} is wanted"
                )
    return None


def excess_divergence(table: Table, setting: str, controls: Sequence[str], treatment: str) -> str:
    """Says which control diverged in fewer replicates than the treatment; empty where none did."""
    mine = table.divergences(setting, treatment)
    for control in controls:
        theirs = table.divergences(setting, control)
        if mine > theirs:
            return f"{treatment} diverged in {mine} runs and {control} in {theirs}"
    return ""


def small_samples(items: int | None, seeds: int, replicate: str, repeated: int) -> list[str]:
    """What the report says about the size of the samples."""
    said = []
    if "seed" in replicate and 3 <= seeds < 6:
        said.append(f"{seeds} seeds only; 6 are the default, and below that a skewed metric can mislead the interval")
    if items is not None and items < 100:
        said.append(f"{items} test items only; fewer than 100 give wide intervals")
    if repeated:
        said.append(f"{repeated} replicates equal another bit for bit and count once")
    return said


def roles(arms: Sequence[Arm], setting: str) -> tuple[list[str], str | None, list[str], list[str]]:
    """Names of the controls, the treatment, the references and the factor cells of a setting."""
    here = [arm for arm in arms if arm.setting == setting]
    treatments = [arm.name for arm in here if arm.role == "treatment"]
    if len(treatments) > 1:
        raise ValueError(
            f"setting {setting!r} has {len(treatments)} treatments ({', '.join(treatments)}); exactly one decides"
        )
    named = {role: [arm.name for arm in here if arm.role == role] for role in ("control", "reference", "factor")}
    return named["control"], treatments[0] if treatments else None, named["reference"], named["factor"]
