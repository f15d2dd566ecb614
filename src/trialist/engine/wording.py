"""How numbers and names are written in reports, evidence and comparisons: one rule for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trialist.engine.contract import ANALYSED_UNITS

WORDS = ("contradicted", "no effect", "inconclusive", "void", "small", "supported")
"""The order in which results are shown: what speaks against a claim comes first"""
MEANING = {
    "supported": "better than every control, by at least the margin",
    "small": "better than every control, by less than the margin",
    "no effect": "no difference worth having",
    "contradicted": "worse than a control, or a guard broken",
    "inconclusive": "these runs cannot tell",
    "void": "the comparison was not fair or not complete",
}
SYMBOLS = {"supported": "✔", "small": "◔", "no effect": "=", "contradicted": "✘", "inconclusive": "?", "void": "∅"}
COST_NAMES = {
    "tokens": "tokens",
    "steps": "steps",
    "flops": "FLOPs",
    "seconds": "seconds",
    "generated_tokens": "generated tokens",
    "verifier_calls": "verifier calls",
    "sequence_forwards": "sequence forwards",
    "bytes": "bytes",
    "bits": "bits",
    "wall_seconds": "wall time",
    "cpu_seconds": "CPU time",
    "peak_bytes": "peak memory",
}


def decimals(*values: float | None) -> int:
    """Decimals at which the largest of the values shows three significant digits (at most 6, at least 0)."""
    largest = max((abs(value) for value in values if value), default=0.0)
    return 2 if largest == 0 else max(0, min(6, 2 - math.floor(math.log10(largest))))


def effect_decimals(effect: Mapping[str, Any]) -> int:
    """Decimals that show two digits of the interval's half width, or three of the effect where there is no interval; two where
    all of it is 0 at the six that there are at most."""
    low, high = effect.get("low"), effect.get("high")
    if max(abs(value or 0.0) for value in (effect.get("effect"), low, high)) < 5e-7:
        return 2
    if low is None or high is None or high <= low:
        return decimals(effect.get("effect"))
    return max(0, min(6, 1 - math.floor(math.log10((high - low) / 2))))


def signed(value: float | None, places: int) -> str:
    """`+0.31`, `−0.02`; `undefined` for None."""
    if value is None:
        return "undefined"
    text = f"{abs(value):.{places}f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def plain(value: float | None, places: int | None = None) -> str:
    if value is None:
        return "undefined"
    text = f"{value:,.{decimals(value) if places is None else places}f}"
    return text.replace("-", "−")


def interval(effect: Mapping[str, Any]) -> str:
    """`[+0.28, +0.34]`, or empty where there is none."""
    if effect.get("low") is None or effect.get("high") is None:
        return ""
    places = effect_decimals(effect)
    return f"[{signed(effect['low'], places)}, {signed(effect['high'], places)}]"


def effect_text(effect: Mapping[str, Any], unit: str = "") -> str:
    """`+0.31 [+0.28, +0.34] nats`, or why it is undefined."""
    if effect.get("effect") is None:
        return f"undefined: {effect.get('reason') or 'no value'}"
    spread = interval(effect)
    missing = "no interval" + (f": {effect['reason']}" if effect.get("reason") else "")
    text = f"{signed(effect['effect'], effect_decimals(effect))} {spread or f'({missing})'}"
    return f"{text} {unit}" if unit else text


def effect_unit(document: Mapping[str, Any]) -> str:
    """Unit of effects and margin: that of the endpoint, or the scale of analysis where that is another, and what an effect over
    arms is counted by."""
    unit = ANALYSED_UNITS.get(document.get("scale") or "identity") or document["unit"]
    return f"{unit} per {document['per']}".strip() if document.get("per") else unit


def margin_text(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def ratio_text(value: float | None) -> str:
    """`0.97×`"""
    if value is None:
        return "–"
    return f"{value:.2f}×" if value < 10 else f"{value:,.0f}×"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def cost_text(unit: str, value: float | None) -> str:
    """A cost in its usual unit: `3 min`, `1.2 GiB`, `4.1 TFLOP`, `819,200`."""
    if value is None:
        return "–"
    if unit.endswith("seconds"):
        return duration(value)
    if unit.endswith("bytes"):
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    if unit == "flops":
        return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"))
    if value >= 1e7:
        return _scaled(value, 1000, ("", "k", "M", "G", "T", "P")).strip()
    return f"{value:,.0f}" if float(value).is_integer() else plain(value)


def sentence(text: str | None) -> str:
    """The text with a full stop, and a capital where its first word is an ordinary one (`d2po` and `GRPO` stay)."""
    text = (text or "").strip()
    if text.partition(" ")[0].rstrip(",:;.").isalpha() and text[:1].islower() and text.partition(" ")[0].islower():
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?")) else text + "."


def weakest(effects: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The effect against the control that is hardest to beat; an undefined one is the hardest."""
    undefined = [effect for effect in effects if effect.get("effect") is None]
    return undefined[0] if undefined else min(effects, key=lambda effect: effect["effect"], default=None)


def cost_ratio(document: Mapping[str, Any]) -> str:
    """The most telling ratio, treatment over the strongest control, with its unit: time where it was measured."""
    ratios = {unit: value for unit, value in document["cost_ratio"].items() if value is not None}
    held = set((document.get("budget") or {}).values())
    for unit in (
        "wall_seconds",
        "seconds",
        "cpu_seconds",
        "flops",
        *[unit for unit in ratios if unit not in held],
        *ratios,
    ):
        if unit in ratios:
            return f"{ratio_text(ratios[unit])} {COST_NAMES.get(unit, unit)}"
    return ""


def source_url(source: str) -> str | None:
    """Address of an arXiv id or of a source that is one."""
    if source.lower().startswith("arxiv:"):
        return f"https://arxiv.org/abs/{source[6:].strip()}"
    return source if source.startswith(("https://", "http://")) else None


def _scaled(value: float, base: int, names: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    return f"{value:.{0 if value >= 100 or power == 0 else 1 if value >= 10 else 2}f} {names[power]}"
