"""What the ledger holds of a run, and what the verdict says: the types that execution, statistics and report share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trialist.engine.contract import Arm, Cost, Items, Outcome

Status = Literal["queued", "running", "done", "diverged", "failed", "stale"]
Word = Literal["supported", "small", "no effect", "contradicted", "inconclusive", "void"]


@dataclass(frozen=True)
class Configuration:
    """A trial with given inputs: what runs and summaries belong to."""

    key: str
    trial: str
    path: str
    preset: str
    inputs: Mapping[str, Any]
    command: str


@dataclass(frozen=True)
class PlannedRun:
    """A run as it is to be stored."""

    id: str
    identity: str
    source: str
    configuration: str
    trial: str
    setting: str
    arm: str
    seed: int
    options: Mapping[str, Any]
    purpose: str = "trial"


@dataclass(frozen=True)
class RunRecord:
    """One arm in one setting with one seed, as stored."""

    id: str
    trial: str
    arm: str
    setting: str
    seed: int
    status: Status
    outcome: Outcome | None = None
    """Present when status is `done` or `diverged`"""
    measured: Mapping[str, float] = field(default_factory=dict)
    """wall_seconds, cpu_seconds: of the run with every stage it used in full; clock_seconds, clock_cpu_seconds: what passed
    while it ran; peak_bytes"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arm options of this run, tuned values included"""
    purpose: Literal["trial", "tuning"] = "trial"
    attempt: int = 1
    error: str | None = None
    """Type and message of an infrastructure failure"""
    traceback: str | None = None
    stages: tuple[str, ...] = ()
    """Names of the stages that it used"""

    def clock(self, name: str) -> float | None:
        """`wall` or `cpu` seconds that passed while it ran; records of old have but one time."""
        own = {"wall": "clock_seconds", "cpu": "clock_cpu_seconds"}[name]
        return self.measured.get(own, self.measured.get(f"{name}_seconds"))

    def cost(self, name: str) -> float | None:
        """A cost unit of the outcome or a measured cost; None where the run has none."""
        if name in self.measured:
            return self.measured[name]
        return self.outcome.cost.as_dict().get(name) if self.outcome else None


@dataclass(frozen=True)
class Effect:
    """Treatment against one control; oriented so that positive is always better.

    `effect`, `low` and `high` are None when undefined, and `reason` says why.
    """

    endpoint: str
    control: str
    setting: str
    effect: float | None
    low: float | None
    high: float | None
    n: int
    """Distinct replicates behind the interval"""
    method: str
    """For example `paired t over seeds, df 5`"""
    p_worse: float | None = None
    """One-sided p value of `effect < 0`"""
    margin: float | None = None
    low90: float | None = None
    high90: float | None = None
    """The 90 % interval, for equivalence"""
    treatment_mean: float | None = None
    control_mean: float | None = None
    """Raw values on the endpoint's own scale and orientation"""
    correlation: float | None = None
    """Of the arms' values over replicates"""
    without_diverged: tuple[float | None, float | None, float | None] | None = None
    """effect, low, high with the pairs left out in which a run diverged"""
    reason: str | None = None
    null_word: Literal["shown null", "effect shown", "undecided"] | None = None
    """For null settings"""
    unit: str = ""
    """Of an effect that is fitted over arms; the difference of two arms has that of its endpoint"""


@dataclass(frozen=True)
class Verdict:
    word: Word
    reason: str
    """One sentence: what decided"""
    sentence: str
    """The verdict in plain words: what it generalises over, effect with interval, against which margin"""
    advice: str
    """Use it, do not use it, or run N more (time)"""
    trial: str
    treatment: str
    setting: str
    effects: tuple[Effect, ...]
    """Primary endpoint, primary setting: one per control"""
    co_primary: tuple[Effect, ...] = ()
    guards: tuple[Effect, ...] = ()
    secondary: tuple[Effect, ...] = ()
    readings: tuple[Effect, ...] = ()
    """What else was fitted over the arms of the primary setting; never decides"""
    settings: tuple[Effect, ...] = ()
    """Primary endpoint in the other non-null settings"""
    null_effects: tuple[Effect, ...] = ()
    references: tuple[Effect, ...] = ()
    """Treatment against reference arms; never decides"""
    savings: tuple[Effect, ...] = ()
    threats: tuple[str, ...] = ()
    """What was not equal, small n, substitutes, missing comparisons"""
    divergences: Mapping[str, int] = field(default_factory=dict)
    """Arm -> diverged runs in the primary setting"""
    cost_ratio: Mapping[str, float] = field(default_factory=dict)
    """Cost unit -> treatment over the strongest control, mean over replicates"""
    cost_equivalent: str | None = None
    """How much more of the control's budget buys the same gain, in words; None where the curves do not tell"""
    more_seeds: int | None = None
    """Further replicates that would decide an inconclusive verdict"""
    data: Any = None
    """The summary (`summary.summarize`) that reports and evidence are rendered from; set by `trialist.run`"""

    def report(self, path: str | None = None) -> str:
        """Writes the HTML report (default: a temporary file) and returns its path; a notebook shows the verdict itself."""
        from trialist.engine.report import write_report

        return str(write_report(self.data, path))

    def _repr_html_(self) -> str:
        from trialist.engine.report import verdict_html

        return verdict_html(self)

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}\n{self.advice}"


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    document = dataclasses.asdict(outcome)
    document["cost"] = outcome.cost.as_dict()
    return document


def outcome_from_json(document: Mapping[str, Any]) -> Outcome:
    items = {
        name: Items(
            tuple(value["ids"]),
            tuple(value["scores"]),
            None if value.get("clusters") is None else tuple(value["clusters"]),
        )
        for name, value in document.get("items", {}).items()
    }
    curves = {
        name: tuple((float(x), float(y)) for x, y in points) for name, points in document.get("curves", {}).items()
    }
    return Outcome(
        metrics=dict(document.get("metrics", {})),
        items=items,
        curves=curves,
        cost=Cost(**document.get("cost", {})),
        diverged=document.get("diverged"),
        undefined=dict(document.get("undefined", {})),
        notes=tuple(document.get("notes", ())),
        covariates=dict(document.get("covariates", {})),
    )


def settings_of(arms: list[Arm]) -> dict[str, list[Arm]]:
    """Setting name -> its arms, in the order declared."""
    grouped: dict[str, list[Arm]] = {}
    for arm in arms:
        grouped.setdefault(arm.setting, []).append(arm)
    return grouped


def primary_setting(arms: list[Arm]) -> str:
    """The setting that decides: the one marked `primary`, else the first that is not null."""
    marked = {arm.setting for arm in arms if arm.primary}
    if len(marked) > 1:
        raise ValueError(f"more than one setting is marked primary: {', '.join(sorted(marked))}")
    if marked:
        return marked.pop()
    for arm in arms:
        if not arm.null:
            return arm.setting
    raise ValueError("every setting is null; a trial needs one that decides")
