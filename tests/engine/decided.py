"""Trials without training: the differences between treatment and each control are given, the runs are made to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Saving, Trial
from trialist.engine.records import RunRecord
from trialist.engine.verdict import decide

MARGIN = 0.1
SCORE = Endpoint("score", unit="points", better="higher", margin=MARGIN)


def claim(**changes: Any) -> Claim:
    return Claim(**{"statement": "new beats old", "source": "arXiv:0", "reported": "+1", "endpoint": SCORE, **changes})


NON_INFERIOR = claim(kind="non-inferiority", saving=Saving("bytes", least=0.4))


@dataclass(frozen=True)
class Given(Trial):
    """A trial whose arms are those of its runs."""

    claim: ClassVar[Claim] = claim()
    budget: ClassVar[Budget] = Budget("steps")

    def arms(self):
        yield from ()

    def run(self, arm, seed, context):
        return Outcome()


def trial(of: Claim | None = None, **attributes: Any) -> Trial:
    return type("Given", (Given,), {"claim": of or claim(), **attributes})()


def arms(*controls: str, **settings: Sequence[str]) -> list[Arm]:
    """Arms of the primary setting and of null settings: `arms("old", shuffled=["old"])`."""
    made = [Arm(name, "control") for name in controls] + [Arm("new", "treatment")]
    for setting, names in settings.items():
        made += [Arm(name, "control", setting=setting, null=True) for name in names]
        made.append(Arm("new", "treatment", setting=setting, null=True))
    return made


def base(seed: int) -> float:
    """What the treatment reaches with a seed: uneven, so that replicates differ."""
    return 5.0 + 0.37 * seed - 0.05 * seed**2


def run(arm: str, seed: int, metrics: Mapping[str, float], setting: str = "main", **changes: Any) -> RunRecord:
    cost = changes.pop("cost", Cost(steps=100))
    outcome = Outcome(metrics=metrics, cost=cost, **changes)
    status = "diverged" if outcome.diverged else "done"
    return RunRecord(f"{arm}-{setting}-{seed}", "given", arm, setting, seed, status, outcome, {"wall_seconds": 60.0})


def runs(
    setting: str = "main", metric: str = "score", sign: float = 1.0, **differences: Sequence[float]
) -> list[RunRecord]:
    """Runs in which the treatment beats control `name` by `differences[name][seed]`."""
    n = len(next(iter(differences.values())))
    made = [run("new", seed, {metric: base(seed)}, setting) for seed in range(n)]
    for name, gaps in differences.items():
        made += [run(name, seed, {metric: base(seed) - sign * gap}, setting) for seed, gap in enumerate(gaps)]
    return made


def and_metric(records: Sequence[RunRecord], metric: str, **differences: Sequence[float]) -> list[RunRecord]:
    """The same runs with a second metric."""
    made = []
    for record in records:
        gap = differences[record.arm][record.seed] if record.arm in differences else 0.0
        outcome = replace(record.outcome, metrics={**record.outcome.metrics, metric: base(record.seed) - gap})
        made.append(replace(record, outcome=outcome))
    return made


def and_cost(records: Sequence[RunRecord], **costs: float) -> list[RunRecord]:
    """The same runs with a cost in bytes per arm."""
    return [
        replace(record, outcome=replace(record.outcome, cost=Cost(steps=100, bytes=costs[record.arm])))
        for record in records
    ]


def items(scores: Sequence[float], clusters: Sequence[str] | None = None) -> Items:
    return Items(
        tuple(f"q{k}" for k in range(len(scores))), tuple(scores), None if clusters is None else tuple(clusters)
    )


def verdict(records: Sequence[RunRecord], made: Sequence[Arm] | None = None, of: Claim | None = None, **options: Any):
    attributes = {key: options.pop(key) for key in ("budget", "effect", "replicate_default") if key in options}
    return decide(trial(of, **attributes), list(made or arms("old")), list(records), **options)
