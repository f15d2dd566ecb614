"""The rules of the verdict: from contrasts to one of the words, in a fixed order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trialist.engine.contrasts import Contrast
from trialist.engine.intervals import FIXED, Interval, Level, holm
from trialist.engine.power import MOST_ITEMS, MOST_SEEDS, least_number, project
from trialist.engine.records import Word

LEAST_REPLICATES = 3

NullWord = Literal["shown null", "effect shown", "undecided"]


@dataclass(frozen=True)
class Evidence:
    """All that the words depend on: contrasts of the primary setting, one per control."""

    endpoints: tuple[tuple[Contrast, ...], ...]
    """The endpoint first, then the co-primary ones"""
    guards: tuple[tuple[Contrast, ...], ...] = ()
    savings: tuple[Contrast, ...] = ()
    non_inferiority: bool = False
    least_saving: float = 0.0
    excess_divergence: str = ""
    """Which control the treatment diverges more often than, in words; empty where none"""
    level: Level = FIXED

    @property
    def decisive(self) -> tuple[Contrast, ...]:
        return tuple(entry for group in self.endpoints for entry in group)

    @property
    def guarding(self) -> tuple[Contrast, ...]:
        return tuple(entry for group in self.guards for entry in group)

    def mapped(self, change: Callable[[Interval], Interval]) -> Evidence:
        def each(group: Sequence[Contrast]) -> tuple[Contrast, ...]:
            return tuple(replace(entry, interval=change(entry.interval)) for entry in group)

        return replace(
            self,
            endpoints=tuple(each(group) for group in self.endpoints),
            guards=tuple(each(group) for group in self.guards),
            savings=each(self.savings),
        )

    def without_diverged(self) -> Evidence | None:
        """The same with the pairs left out in which a run diverged; None where none did."""
        groups = (*self.endpoints, *self.guards)
        if all(entry.without is None for group in groups for entry in group):
            return None

        def each(group: Sequence[Contrast]) -> tuple[Contrast, ...]:
            return tuple(replace(entry, interval=entry.without or entry.interval) for entry in group)

        return replace(
            self, endpoints=tuple(each(g) for g in self.endpoints), guards=tuple(each(g) for g in self.guards)
        )


@dataclass(frozen=True)
class Decision:
    word: Word
    against: tuple[Contrast, ...] = ()
    """The contrasts that decided: the ones shown worse, equivalent, or a broken guard"""
    undecided: tuple[tuple[Contrast, str], ...] = ()
    """For `inconclusive`: what is open, and why"""
    broken_guard: bool = False
    too_little_saved: bool = False
    """`no effect` of a non-inferiority claim: the contrasts of `against` are savings, and the least one is ruled out"""
    too_few: int | None = None
    """Replicates, where they are fewer than the least for a verdict"""


def word_for(evidence: Evidence) -> Decision:
    """The word, `void` apart: that one is decided before, from the conduct of the trial."""
    fewest = min((entry.interval.n for entry in evidence.decisive), default=0)
    if fewest < LEAST_REPLICATES:
        return Decision("inconclusive", too_few=fewest, undecided=_open(evidence))
    guarded = all(_inside_guard(entry) for entry in evidence.guarding) and not evidence.excess_divergence
    decide = _non_inferiority if evidence.non_inferiority else _superiority
    return decide(evidence, guarded)


def _superiority(evidence: Evidence, guarded: bool) -> Decision:
    level, decisive = evidence.level, evidence.decisive
    if guarded and all(entry.interval.lies_above_zero() for entry in decisive):
        reached = all(_reaches(_estimate(entry), entry.margin) for entry in decisive)
        return Decision("supported" if reached else "small", decisive)
    worse = _rejected(decisive, [entry.interval.p_below(0.0) for entry in decisive], level.alpha, level)
    worse = [e for e in worse if e.interval.lies_below_zero() and _reaches(-_estimate(e), e.margin)]
    if worse:
        return Decision("contradicted", tuple(worse))
    if broken := _broken_guards(evidence):
        return Decision("contradicted", broken, broken_guard=True)
    equal = _rejected(
        decisive,
        [max(e.interval.p_above(-e.margin), e.interval.p_below(e.margin)) for e in decisive],
        level.equivalence,
        level,
    )
    equal = [e for e in equal if e.margin > 0 and _inside(e.interval.low90, e.interval.high90, e.margin)]
    if equal:
        return Decision("no effect", tuple(equal))
    return Decision("inconclusive", undecided=_open(evidence))


def _non_inferiority(evidence: Evidence, guarded: bool) -> Decision:
    level, decisive = evidence.level, evidence.decisive
    holds = guarded and all(entry.interval.low is not None and entry.interval.low > -entry.margin for entry in decisive)
    lows = [entry.interval.low for entry in evidence.savings]
    if holds and lows and all(low is not None and low > 0 for low in lows):
        reached = all(low is not None and _reaches(low, evidence.least_saving) for low in lows)
        return Decision("supported" if reached else "small", decisive)
    worse = _rejected(decisive, [entry.interval.p_below(-entry.margin) for entry in decisive], level.alpha, level)
    worse = [entry for entry in worse if entry.interval.high is not None and entry.interval.high < -entry.margin]
    if worse:
        return Decision("contradicted", tuple(worse))
    if broken := _broken_guards(evidence):
        return Decision("contradicted", broken, broken_guard=True)
    least = evidence.least_saving
    below = _rejected(
        evidence.savings, [entry.interval.p_below(least) for entry in evidence.savings], level.equivalence, level
    )
    below = [entry for entry in below if entry.interval.high90 is not None and entry.interval.high90 < least]
    if below:
        return Decision("no effect", tuple(below), too_little_saved=True)
    return Decision("inconclusive", undecided=_open(evidence))


def null_word(contrasts: Sequence[Contrast]) -> NullWord:
    """Whether a negative control behaves: no effect, the effect of the claim, or not known."""
    if not contrasts or any(entry.interval.n < LEAST_REPLICATES for entry in contrasts):
        return "undecided"
    if all(entry.interval.high is not None and entry.interval.high < entry.margin for entry in contrasts):
        return "shown null"
    if all(entry.interval.lies_above_zero() and _reaches(_estimate(entry), entry.margin) for entry in contrasts):
        return "effect shown"
    return "undecided"


def more_replicates(evidence: Evidence, now: int, unit: Literal["seeds", "items"]) -> int | None:
    """How many more seeds (or items) would decide, if estimates and variances stay as they are; None if none would."""

    def decided(n: int) -> bool:
        grown = evidence.mapped(lambda i: project(i, seeds=n) if unit == "seeds" else project(i, items=n))
        return word_for(grown).word != "inconclusive"

    measured = (*evidence.decisive, *(e for e in evidence.guarding if not _equal_throughout(e)), *evidence.savings)
    if any(not entry.interval.defined for entry in measured):
        return None
    found = least_number(decided, now, MOST_SEEDS if unit == "seeds" else MOST_ITEMS)
    return None if found is None else found - now


def _open(evidence: Evidence) -> tuple[tuple[Contrast, str], ...]:
    """What keeps the verdict open, as short clauses."""
    found: list[tuple[Contrast, str]] = []
    for entry in evidence.decisive:
        i = entry.interval
        if not i.defined:
            found.append((entry, i.reason or "undefined"))
        elif evidence.non_inferiority:
            if i.low is not None and i.low <= -entry.margin:
                found.append((entry, "it could be worse by more than the margin"))
        elif not i.lies_above_zero():
            worse = i.lies_below_zero()
            found.append((entry, "it is worse, but by less than the margin" if worse else "the interval includes 0"))
    for entry in evidence.guarding:
        if _inside_guard(entry):
            continue
        if not entry.interval.defined:
            found.append((entry, entry.interval.reason or "undefined"))
        else:
            found.append((entry, "this guard could be worse by more than its margin"))
    for entry in evidence.savings:
        if not entry.interval.defined:
            found.append((entry, entry.interval.reason or "undefined"))
        elif entry.interval.low is not None and entry.interval.low <= 0:
            found.append((entry, "a saving is not shown"))
    return tuple(found)


def _rejected(contrasts: Sequence[Contrast], p_values: list[float], alpha: float, level: Level) -> list[Contrast]:
    return [entry for entry, shown in zip(contrasts, holm(p_values, alpha, level)) if shown and entry.interval.defined]


def _broken_guards(evidence: Evidence) -> tuple[Contrast, ...]:
    broken: list[Contrast] = []
    for group in evidence.guards:
        p_values = [entry.interval.p_below(-entry.margin) for entry in group]
        shown = _rejected(group, p_values, evidence.level.alpha, evidence.level)
        broken += [entry for entry in shown if entry.interval.high is not None and entry.interval.high < -entry.margin]
    return tuple(broken)


def _inside_guard(entry: Contrast) -> bool:
    return _equal_throughout(entry) or (entry.interval.low is not None and entry.interval.low > -entry.margin)


def _equal_throughout(entry: Contrast) -> bool:
    """Whether the arms have the same value in every replicate. That is no interval, but nothing was lost either, as where both
    answer everything; that the arms differ at all is shown by the endpoint, whose own interval decides."""
    interval = entry.interval
    return not interval.defined and interval.n >= LEAST_REPLICATES and interval.estimate == 0.0


def _inside(low: float | None, high: float | None, margin: float) -> bool:
    return low is not None and high is not None and -margin < low and high < margin


def _reaches(value: float, wanted: float) -> bool:
    # The order of a sum and the unit of the values may move the last digits, never the word.
    return value >= wanted * (1 - 1e-9)


def _estimate(entry: Contrast) -> float:
    assert entry.interval.estimate is not None
    return entry.interval.estimate
