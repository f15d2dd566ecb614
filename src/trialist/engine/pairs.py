"""The paired comparison of two lists of scores over the same items, and how it reads on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trialist.engine import wording
from trialist.engine.contract import Endpoint, Items
from trialist.engine.contrasts import contrast_items
from trialist.engine.rules import LEAST_REPLICATES, Evidence, word_for

SHOWN_FLIPS = 5


def check_question(better: str, margin: float | None) -> None:
    """Raises ValueError for a direction that is none and a margin that is not above 0."""
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', not {better!r}")
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin must be > 0, not {margin}; leave it out for effect and interval alone")


def compare_items(
    control: Items,
    treatment: Items,
    *,
    metric: str,
    better: Literal["higher", "lower"],
    margin: float | None,
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """The effect of the treatment over the same items, with interval, flips and, with a margin, a verdict.

    Items of one cluster are not independent and count together. Raises ValueError where the items differ.
    """
    check_question(better, margin)
    remarks = list(remarks)
    ids, clusters = control.ids, control.clusters
    by_id = dict(zip(treatment.ids, treatment.scores))
    scores = [control.scores, tuple(by_id.get(item, math.nan) for item in ids)]
    endpoint = Endpoint(metric, better=better, margin=margin)
    contrast = contrast_items(control, treatment, endpoint, "A")
    effect = contrast.effect()
    word = None
    if margin is not None and effect.n >= LEAST_REPLICATES:
        word = word_for(Evidence(((contrast,),))).word
    sign = 1 if better == "higher" else -1
    gains = {item: sign * (second - first) for item, first, second in zip(ids, *scores)}
    binary = all(score in (0.0, 1.0) for side in scores for score in side)
    won, lost = sum(gain > 0 for gain in gains.values()), sum(gain < 0 for gain in gains.values())
    if binary and clusters is not None:
        remarks.append("McNemar's test takes the items as independent and knows nothing of the clusters.")
    units = "items" if clusters is None else "clusters of items"
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
        "metric": metric,
        "better": better,
        "margin": margin,
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
    """The result of `compare_files` or `compare_runs` as text for a terminal."""
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


def _mcnemar(won: int, lost: int) -> float | None:
    """Exact two-sided p value for the discordant pairs; None where there is none."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else None
