"""What to do with a verdict: use it, do not use it, or what would decide it and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trialist.engine.contract import Replicate
from trialist.engine.effects import LEAST_MODELS
from trialist.engine.rules import LEAST_REPLICATES, Decision, Evidence, more_replicates
from trialist.engine.sentences import joined
from trialist.engine.table import Table

_COSTS = (("wall_seconds", "wall time"), ("flops", "FLOPs"), ("generated_tokens", "generated tokens"))


@dataclass(frozen=True)
class More:
    """What would decide an open verdict, and what it costs."""

    unit: Literal["seeds", "items", "models"]
    count: int
    minutes: float | None


def what_decides(
    decision: Decision, evidence: Evidence, replicate: Replicate, table: Table, models: bool = False
) -> tuple[More, ...]:
    """Ways to decide an inconclusive verdict, the cheaper one first; empty where more of the same would not.

    models: the effect is an association over models, which has its own least number.
    """
    per_seed = minutes_per_seed(table)
    main = evidence.endpoints[0][0]
    seeds, items = main.interval.n, main.items
    if models and seeds < LEAST_MODELS:
        return (More("models", LEAST_MODELS - seeds, None),)
    if decision.too_few is not None:
        if replicate == "item":
            return (More("items", LEAST_REPLICATES - seeds, None),)
        lacking = LEAST_REPLICATES - seeds + (0 if main.repeated == 0 else 10**6)
        return (More("seeds", lacking, _times(per_seed, lacking)),) if lacking < 10**6 else ()
    found: list[tuple[float, More]] = []
    if replicate != "item" and (count := more_replicates(evidence, seeds, "seeds")) is not None:
        found.append((count / seeds, More("seeds", count, _times(per_seed, count))))
    if items is not None and replicate != "seed":
        now = main.interval.n if replicate == "item" else items
        if (count := more_replicates(evidence, now, "items")) is not None:
            # A run costs at most in proportion to its items, so this is an upper bound of what they cost.
            total = _times(per_seed, len({seed for (_, _, seed) in table.runs}))
            found.append((count / now, More("items", count, None if total is None else total * count / now)))
    return tuple(more for _, more in sorted(found, key=lambda pair: pair[0]))


def minutes_per_seed(table: Table) -> float | None:
    """Wall minutes that one more seed costs in all arms and settings; None where times are not known."""
    by_arm: dict[tuple[str, str], list[float]] = {}
    for (setting, arm, _), run in table.runs.items():
        if (seconds := run.clock("wall")) is not None:
            by_arm.setdefault((setting, arm), []).append(seconds)
    if not by_arm:
        return None
    return sum(sum(times) / len(times) for times in by_arm.values()) / 60.0


def advice(
    decision: Decision,
    evidence: Evidence,
    treatment: str,
    factor: bool,
    ratios: Mapping[str, float],
    more: Sequence[More],
    strongest: str,
    price: str = "",
) -> str:
    """One sentence that begins with what to do.

    ratios: cost unit -> treatment over `strongest`; price: the one among them that each use of the technique pays.
    """
    name = evidence.endpoints[0][0].endpoint.name.replace("_", " ")
    if decision.word == "inconclusive":
        return _go_on(decision, evidence, more)
    if factor:
        return {
            "supported": f"Count on it: the claimed effect on {name} is there at the size that matters.",
            "small": f"Do not build on it: the effect on {name} is there, but smaller than the margin.",
            "no effect": f"Do not count on it: an effect on {name} worth having is ruled out.",
            "contradicted": f"Do not count on it: the effect on {name} goes the other way.",
        }[decision.word]
    cost = _cost_words(ratios, strongest, price)
    if decision.word == "supported":
        gain = (
            "as good within the margin, and it saves"
            if evidence.non_inferiority
            else f"the gain in {name} is worth having"
        )
        return f"Use it: {gain}{cost}."
    if decision.word == "small":
        short = "the saving is" if evidence.non_inferiority else f"the gain in {name} is"
        return f"Use it only where it costs nothing: {short} real but smaller than what was set as worth having{cost}."
    if decision.too_little_saved:
        saved = decision.against[0].endpoint.name.replace("_", " ")
        return f"Do not use it to save {saved}: a saving worth having over {_controls(decision)} is ruled out{cost}."
    if decision.word == "no effect":
        return f"Do not use it for {name}: a gain worth having over {_controls(decision)} is ruled out{cost}."
    if decision.broken_guard:
        guard = decision.against[0].endpoint.name.replace("_", " ")
        return f"Do not use it: it costs more {guard} than was accepted{cost}."
    return f"Do not use it: against {_controls(decision)} it is worse by at least the margin{cost}."


def _go_on(decision: Decision, evidence: Evidence, more: Sequence[More]) -> str:
    if not more:
        if evidence.excess_divergence:
            return f"Find out why it diverges before running more: {evidence.excess_divergence}."
        first = evidence.endpoints[0][0]
        if decision.too_few is not None and first.repeated:
            return (
                "More seeds will not help: they change nothing here, every seed gives the same runs; generalise over "
                "items instead, or make the seed change the initial weights or the data order."
            )
        for entry, why in decision.undecided:
            if not entry.interval.defined:
                name = entry.endpoint.name.replace("_", " ")
                return f"More seeds will not help by themselves: {name} is undefined ({why})."
        return (
            "More seeds are unlikely to decide it: the effect lies at the margin. Try a longer run or another margin."
        )
    said = f"Run {_more_words(more[0])}"
    if len(more) > 1:
        said += f", or {_more_words(more[1])}"
    if more[0].unit == "models":
        return f"{said}: an association needs at least {LEAST_MODELS}."
    if decision.too_few is not None:
        return f"{said}: a verdict needs at least {LEAST_REPLICATES} replicates."
    return f"{said}: that decides it if the effect stays as it looks now."


def _more_words(more: More) -> str:
    noun = more.unit if more.count != 1 else more.unit[:-1]
    if more.minutes is None:
        return f"{more.count:,} more {noun}"
    bound = "about" if more.unit == "seeds" else "at most about"
    return f"{more.count:,} more {noun} ({bound} {_duration(more.minutes)})"


def _cost_words(ratios: Mapping[str, float], strongest: str, price: str) -> str:
    said = [f"{ratios[unit]:.2f} times the {words}" for unit, words in _COSTS if unit in ratios][:2]
    if price in ratios:
        said.append(f"{ratios[price]:.2f} times the {price.replace('_', ' ')}")
    return f", at {joined(said)} of {strongest}" if said else ""


def _controls(decision: Decision) -> str:
    return " and ".join(dict.fromkeys(entry.control for entry in decision.against))


def _times(minutes: float | None, count: int) -> float | None:
    return None if minutes is None else minutes * count


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{max(1, round(60 * minutes))} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"
