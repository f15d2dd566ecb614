"""The verdict in plain words: what was found, by how much, over what it generalises, and what to do now."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trialist.engine.contract import Endpoint, Replicate
from trialist.engine.contrasts import Contrast
from trialist.engine.intervals import Interval
from trialist.engine.rules import LEAST_REPLICATES, Decision, Evidence


def generalises_over(replicate: Replicate, contrast: Contrast, trained: bool = True) -> str:
    """`over 6 training seeds`, `for this model, over 1,319 items`."""
    n, items = contrast.interval.n, contrast.items
    over_items = "" if items is None else f"{items:,} items"
    if items is not None and contrast.clusters is not None and contrast.clusters < items:
        over_items += f" in {contrast.clusters:,} clusters"
    if replicate == "item":
        return f"for this model, over {over_items or _count(n, 'item')}"
    if replicate == "model":
        return f"over {_count(n, 'model')}"
    seeds = _count(n, "training seed" if trained else "seed")
    return f"over {seeds} and {over_items}" if replicate == "seed x item" and over_items else f"over {seeds}"


def margin_words(endpoint: Endpoint) -> str:
    """The margin so that a reader knows how large it is: `0.02 bits`, `2 % (0.02 on the log scale)`."""
    margin = endpoint.margin or 0.0
    if endpoint.scale == "log":
        return f"{_percent(_relative(margin, endpoint))} ({margin:g} on the log scale)"
    if endpoint.scale == "logit":
        return f"a factor of {math.exp(margin):.3g} in the odds ({margin:g} on the logit scale)"
    return f"{margin:g}{_unit(endpoint)}"


def size_words(contrast: Contrast, ninety: bool = False) -> str:
    """`0.31 (95 % interval 0.27 to 0.35)`, oriented so that positive is in the direction of the estimate."""
    i, endpoint = contrast.interval, contrast.endpoint
    if i.estimate is None:
        return "an undefined amount"
    low, high = (i.low90, i.high90) if ninety else (i.low, i.high)
    turned = i.estimate < 0
    values = [i.estimate, low, high] if not turned else [-i.estimate, _minus(high), _minus(low)]
    label = _label(i, ninety)
    shown = _on_scale(values, endpoint, turned)
    if low is None or high is None:
        return f"{shown[0]} (no interval: {i.reason})"
    if i.df is None and low == high:
        return f"{shown[0]} (counted, the same in every run)"
    return f"{shown[0]} ({label} {shown[1]} to {shown[2]})"


def change_words(contrast: Contrast, treatment: str) -> str:
    """`selective attention lowers bits per byte by 0.31 (95 % interval 0.27 to 0.35)`."""
    endpoint = contrast.endpoint
    up = ((contrast.interval.estimate or 0.0) >= 0) == (endpoint.better == "higher")
    return f"{treatment} {'raises' if up else 'lowers'} {_odds(endpoint)}{_name(endpoint)} by {size_words(contrast)}"


def against_words(contrasts: Sequence[Contrast]) -> str:
    """Effects against several controls: the weakest first, all of them up to three."""
    ordered = sorted(contrasts, key=_strength)
    first = ordered[0]
    if len(ordered) == 1:
        return f"against {first.control}"
    if len(ordered) > 3:
        return f"against {first.control}, and by more against the other {len(ordered) - 1} controls"
    rest = " and ".join(f"by {size_words(entry)} against {entry.control}" for entry in ordered[1:])
    return f"against {first.control} and {rest}"


def sentence(
    decision: Decision, evidence: Evidence, treatment: str, replicate: Replicate, trained: bool, factor: bool
) -> str:
    """What was found, in one sentence."""
    main = evidence.endpoints[0]
    over = generalises_over(replicate, min(main, key=_strength), trained)
    if decision.too_few is not None:
        return _too_few(decision.too_few, main, replicate)
    body = {
        "supported": _won,
        "small": _won,
        "contradicted": _lost,
        "no effect": _nothing,
        "inconclusive": _open,
    }[decision.word](decision, evidence, treatment, factor)
    return f"{body}; {over}."


def effect_words(contrasts: Sequence[Contrast], treatment: str, factor: bool) -> str:
    weakest = min(contrasts, key=_strength)
    if factor:
        return (
            f"the {weakest.control} for {_odds(weakest.endpoint)}{_name(weakest.endpoint)} is {signed_words(weakest)}"
        )
    return f"{change_words(weakest, treatment)} {against_words(contrasts)}"


def signed_words(contrast: Contrast, ninety: bool = False) -> str:
    """An effect with its sign, positive is better."""
    i, label = contrast.interval, _label(contrast.interval, ninety)
    if i.estimate is None:
        return "undefined"
    low, high = (i.low90, i.high90) if ninety else (i.low, i.high)
    if low is None or high is None:
        return f"{_on_scale([i.estimate], contrast.endpoint, False)[0]} (no interval: {i.reason})"
    shown = _on_scale([i.estimate, low, high], contrast.endpoint, False)
    good = "above 1" if contrast.endpoint.scale == "logit" else "positive"
    return f"{shown[0]}{_per(contrast)} ({label} {shown[1]} to {shown[2]}; {good} is better)"


def saving_words(contrasts: Sequence[Contrast], least: float, ninety: bool = False) -> str:
    weakest = min(contrasts, key=_strength)
    i = weakest.interval
    name = _name(weakest.endpoint)
    if not i.defined or i.estimate is None or i.low is None or i.high is None:
        return f"its saving of {name} is undefined ({i.reason})"
    low, high = (i.low90, i.high90) if ninety else (i.low, i.high)
    shown = _plain([100 * value for value in (i.estimate, low or 0.0, high or 0.0)])
    spread = "counted" if low == high else f"{_label(i, ninety)} {shown[1]} to {shown[2]} %"
    return f"it saves {shown[0]} % of {name} ({spread}; at least {100 * least:g} % is wanted)"


def reason(decision: Decision, evidence: Evidence) -> str:
    """Which rule decided."""
    if decision.too_few is not None:
        return f"{decision.too_few} replicates are fewer than the {LEAST_REPLICATES} that a verdict needs"
    if decision.word in ("supported", "small"):
        if evidence.non_inferiority:
            reached = "reaches" if decision.word == "supported" else "stays below"
            return f"no worse than every control within the margin, and the saving {reached} its least value"
        reached = "reaches the margin" if decision.word == "supported" else "stays below the margin"
        return f"the lower bound is above 0 against every control, and the estimate {reached}"
    names = joined(list(dict.fromkeys(entry.control for entry in decision.against)))
    if decision.word == "contradicted":
        if decision.broken_guard:
            guards = joined(list(dict.fromkeys(_name(entry.endpoint) for entry in decision.against)))
            return f"the guard {guards} is shown to be worse by more than its margin (against {names})"
        if evidence.non_inferiority:
            return f"the interval lies wholly below minus the margin against {names}"
        return f"shown worse, and by at least the margin, against {names}"
    if decision.too_little_saved:
        return f"the 90 % interval of the saving lies below its least value against {names}"
    if decision.word == "no effect":
        return f"the 90 % interval lies inside plus or minus the margin against {names}"
    clauses = [f"{_name(entry.endpoint)} against {entry.control}: {why}" for entry, why in decision.undecided]
    if evidence.excess_divergence:
        clauses.append(evidence.excess_divergence)
    return "undecided: " + ("; ".join(clauses) or "no rule applies")


def _won(decision: Decision, evidence: Evidence, treatment: str, factor: bool) -> str:
    main = evidence.endpoints[0]
    margin = margin_words(main[0].endpoint)
    if evidence.non_inferiority:
        weakest = min(main, key=_strength)
        parts = [
            f"{treatment} is no worse than {joined([entry.control for entry in main])} on {_name(weakest.endpoint)}:"
            f" the difference is {signed_words(weakest)}, inside the margin of {margin}",
            saving_words(evidence.savings, evidence.least_saving),
        ]
        return ", and ".join(parts)
    parts = []
    for group in evidence.endpoints:
        below = any((entry.interval.estimate or 0.0) < entry.margin * (1 - 1e-9) for entry in group)
        side = "less than" if below else "at least"
        parts.append(
            f"{effect_words(group, treatment, factor)}, {side} the margin of {margin_words(group[0].endpoint)}{_per(group[0])}"
        )
    said = "; and ".join(parts)
    if evidence.guards:
        said += f"; {joined([_name(group[0].endpoint) for group in evidence.guards])} stays within its margin"
    return said


def _lost(decision: Decision, evidence: Evidence, treatment: str, factor: bool) -> str:
    worst = min(decision.against, key=_strength)
    margin = margin_words(worst.endpoint) + _per(worst)
    found = effect_words([worst], treatment, factor)
    if decision.broken_guard:
        return f"{found}: a guard is broken, at most {margin} of loss was accepted"
    return f"{found}: worse by {'more than' if evidence.non_inferiority else 'at least'} the margin of {margin}"


def _nothing(decision: Decision, evidence: Evidence, treatment: str, factor: bool) -> str:
    first = decision.against[0]
    if decision.too_little_saved:
        saved = saving_words(decision.against, evidence.least_saving, ninety=True)
        weakest = min(evidence.endpoints[0], key=_strength)
        against = min(decision.against, key=_strength).control
        return (
            f"{treatment} saves too little against {against}: {saved}; on {_name(weakest.endpoint)} the difference is "
            f"{signed_words(weakest)}, at a margin of {margin_words(weakest.endpoint)}"
        )
    said = f"{treatment or first.control} changes {_odds(first.endpoint)}{_name(first.endpoint)} by less than the margin of "
    said += f"{margin_words(first.endpoint)}{_per(first)}: {signed_words(first, ninety=True)}"
    return said if factor else f"{said} against {first.control}"


def _open(decision: Decision, evidence: Evidence, treatment: str, factor: bool) -> str:
    defined = [entry for entry in evidence.endpoints[0] if entry.interval.defined]
    clauses = []
    if defined:
        clauses.append(effect_words(defined, treatment, factor))
    groups: dict[tuple[str, str], list[str]] = {}
    for entry, why in decision.undecided:
        groups.setdefault((_name(entry.endpoint), why), []).append(entry.control)
    for (name, why), controls in groups.items():
        clauses.append(f"{name} against {joined(controls)}: {why}" if not factor else f"{name}: {why}")
    if evidence.excess_divergence:
        clauses.append(evidence.excess_divergence)
    return "not decided: " + "; ".join(clauses)


def _too_few(n: int, main: Sequence[Contrast], replicate: Replicate) -> str:
    first, why = main[0], main[0].interval.reason
    unit = {"item": "item or cluster of items", "model": "model"}.get(replicate, "seed")
    said = f"no verdict: {_count(n, unit) if n != 1 or replicate != 'item' else '1 ' + unit}"
    said += f", and a verdict needs at least {LEAST_REPLICATES}"
    if first.repeated:
        said += f" that differ ({first.repeated} equal another bit for bit)"
    if first.interval.estimate is not None:
        estimate = _plain([first.interval.estimate])[0]
        said += f"; so far the difference in {_name(first.endpoint)} is {estimate} (positive is better)"
    elif why and n:
        said += f" ({why})"
    return said + "."


def _on_scale(values: Sequence[float | None], endpoint: Endpoint, turned: bool) -> list[str]:
    if endpoint.scale == "logit":
        factors = _plain([math.exp(value or 0.0) for value in values])
        return ["a factor of " + factors[0], *factors[1:]]
    if endpoint.scale == "log":
        sign = -1.0 if turned else 1.0
        shares = [sign * 100 * _relative(sign * (v or 0.0), endpoint) for v in values]
        return [text + " %" for text in _plain(shares)]
    shown = _plain([v or 0.0 for v in values])
    return [shown[0] + _unit(endpoint), *shown[1:]]


def _relative(gain: float, endpoint: Endpoint) -> float:
    """Relative change of the raw value, positive is better, for a gain on the log scale."""
    sign = 1.0 if endpoint.better == "higher" else -1.0
    return sign * math.expm1(sign * gain)


def _plain(values: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as the spread of an interval deserves; a bound that is not 0 never reads 0."""
    spread = max(values) - min(values) or abs(values[0]) / 2 or 1.0
    places = max(0, min(8, math.ceil(-math.log10(spread / 4))))
    while places < 8 and any(value != 0 and round(value, places) == 0 for value in values):
        places += 1
    return [f"{value:,.{places}f}" for value in values]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _label(interval: Interval, ninety: bool) -> str:
    return interval.level.label.replace("95", "90") if ninety else interval.level.label


def _name(endpoint: Endpoint) -> str:
    return endpoint.name.replace("_", " ")


def _odds(endpoint: Endpoint) -> str:
    return "the odds of " if endpoint.scale == "logit" else ""


def _per(contrast: Contrast) -> str:
    return f" per {contrast.per}" if contrast.per else ""


def _unit(endpoint: Endpoint) -> str:
    unit = endpoint.unit
    said_already = unit.replace("/", " per ").replace("  ", " ") == _name(endpoint)
    return "" if not unit or said_already else f" {unit}"


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _strength(contrast: Contrast) -> float:
    """Weakest first; an undefined effect is the weakest."""
    interval: Interval = contrast.interval
    return -math.inf if interval.estimate is None else interval.estimate
