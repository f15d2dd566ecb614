"""How often the intervals cover and the verdict errs: simulated trials with known effects.

`python benchmarks/verdict_statistics.py` prints the tables of docs/statistics.md (about ten minutes on one core). Every
function gives percentages; the slow tests hold them to their bounds with the same code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Saving, Trial
from trialist.engine.intervals import FIXED, Level, crossed_t, t_interval
from trialist.engine.item_intervals import bca, item_interval
from trialist.engine.power import detectable_effect
from trialist.engine.records import RunRecord
from trialist.engine.sequential import Look
from trialist.engine.verdict import decide

Draw = Callable[[np.random.Generator, int], np.ndarray]
MARGIN = 0.01
"""Close to 0, in standard deviations: the hardest margin for a rule that must not call noise an effect"""


def normal(g: np.random.Generator, n: int) -> np.ndarray:
    return g.normal(size=n)


def heavy(g: np.random.Generator, n: int) -> np.ndarray:
    """Student's t with 2 degrees of freedom: its variance is infinite."""
    return g.standard_t(2, size=n)


def one_in_three(g: np.random.Generator, n: int) -> np.ndarray:
    """Both arms learn (score 1) with one seed in three, each on its own; otherwise they stay near 0."""
    return (g.random(n) < 1 / 3).astype(float) - (g.random(n) < 1 / 3) + 0.02 * g.normal(size=n)


def skewed_lottery(g: np.random.Generator, n: int) -> np.ndarray:
    """The treatment gains 2 with one seed in three and loses 1 otherwise: mean 0, as skewed as a bimodal one gets."""
    return np.where(g.random(n) < 1 / 3, 2.0, -1.0) + 0.02 * g.normal(size=n)


@dataclass(frozen=True)
class Coverage:
    covered: float
    too_high: float
    """Percentage whose lower bound lies above the truth: what would be a false `supported`"""
    too_low: float


def coverage(make: Callable[[np.random.Generator], object], truth: float, repeats: int, seed: int) -> Coverage:
    g = np.random.default_rng(seed)
    intervals = [make(g) for _ in range(repeats)]
    above = 100 * sum(i.low is not None and i.low > truth for i in intervals) / repeats  # type: ignore[attr-defined]
    below = 100 * sum(i.high is not None and i.high < truth for i in intervals) / repeats  # type: ignore[attr-defined]
    return Coverage(100 - above - below, above, below)


def seed_coverage(n: int, draw: Draw = normal, truth: float = 0.0, repeats: int = 20_000, seed: int = 1) -> Coverage:
    return coverage(lambda g: t_interval(truth + draw(g, n)), truth, repeats, seed)


WORLDS = {"seed noise": (1.0, 0.1), "item noise": (0.1, 4.0), "both": (0.5, 3.0), "neither": (0.0, 0.0)}
"""Standard deviation of one seed's and of one item's own effect; the rest has 1"""


def crossed_coverage(n: int, world: str, items: int = 60, repeats: int = 4_000, seed: int = 2) -> Coverage:
    by_seed, by_item = WORLDS[world]

    def make(g: np.random.Generator) -> object:
        noise = by_seed * g.normal(size=(n, 1)) + by_item * g.normal(size=(1, items)) + g.normal(size=(n, items))
        return crossed_t(0.3 + noise)

    return coverage(make, 0.3, repeats, seed)


def item_coverage(clusters: int, draw: Draw, repeats: int = 2_000, seed: int = 3) -> Coverage:
    return coverage(lambda g: item_interval(draw(g, clusters)), 0.0, repeats, seed)


def bca_coverage(items: int, draw: Draw, repeats: int = 2_000, seed: int = 3) -> Coverage:
    """The bootstrap alone, without the t interval that the engine sets beside it."""

    def make(g: np.random.Generator) -> object:
        d = draw(g, items)
        resamples = d[g.integers(0, items, size=(2_000, items))].mean(axis=1)
        left_out = (d.sum() - d) / (items - 1)
        return bca(float(d.mean()), resamples, left_out, items, "BCa", t_interval(d))

    return coverage(make, 0.0, repeats, seed)


@dataclass(frozen=True)
class Simulated(Trial):
    """A trial whose differences are drawn and not measured."""

    claim: ClassVar[Claim] = Claim("a", "b", "c", Endpoint("score", margin=MARGIN))
    budget: ClassVar[Budget] = Budget("steps")

    def arms(self) -> Iterator[Arm]:
        yield from ARMS

    def run(self, arm: Arm, seed: int, context: object) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class SimulatedNonInferiority(Simulated):
    """The same for a claim of no loss."""

    claim: ClassVar[Claim] = Claim(
        "a", "b", "c", Endpoint("score", margin=1.0), kind="non-inferiority", saving=Saving("bytes", least=0.1)
    )


ARMS = (Arm("old", "control"), Arm("new", "treatment"))


def record(arm: str, seed: int, value: float, items: np.ndarray | None = None) -> RunRecord:
    scores = {} if items is None else {"score": Items(tuple(map(str, range(len(items)))), tuple(items))}
    cost = Cost(steps=1, bytes=100 if arm == "old" else 50)
    return RunRecord(
        f"{arm}{seed}", "simulated", arm, "main", seed, "done", Outcome({"score": value}, scores, cost=cost)
    )


def words(
    draw: Draw,
    effect: float,
    looks: Sequence[int],
    look: Look | None = None,
    trials: int = 2_000,
    seed: int = 4,
    of: Trial | None = None,
) -> dict[str, float]:
    """Percentage of each word over simulated trials through the real `decide`, stopped at the first look that decides."""
    g, counts = np.random.default_rng(seed), dict[str, int]()
    for _ in range(trials):
        gains = effect + draw(g, max(looks))
        old = g.normal(size=max(looks))
        runs = [
            record(arm, s, float(value))
            for s in range(max(looks))
            for arm, value in (("old", old[s]), ("new", old[s] + gains[s]))
        ]
        word = "inconclusive"
        for n in looks:
            word = decide(of or Simulated(), ARMS, runs[: 2 * n], look=look).word
            if word != "inconclusive":
                break
        counts[word] = counts.get(word, 0) + 1
    return {word: 100 * count / trials for word, count in sorted(counts.items())}


def crossed_words(n: int, world: str, items: int = 30, trials: int = 2_000, seed: int = 5) -> dict[str, float]:
    """The same for seeds x items without any effect."""
    by_seed, by_item = WORLDS[world]
    g, counts = np.random.default_rng(seed), dict[str, int]()
    for _ in range(trials):
        gains = by_seed * g.normal(size=(n, 1)) + by_item * g.normal(size=(1, items)) + g.normal(size=(n, items))
        old = g.normal(size=(n, items))
        runs = [
            record(arm, s, float(values[s].mean()), values[s])
            for s in range(n)
            for arm, values in (("old", old), ("new", old + gains))
        ]
        word = decide(Simulated(), ARMS, runs, replicate="seed x item").word
        counts[word] = counts.get(word, 0) + 1
    return {word: 100 * count / trials for word, count in sorted(counts.items())}


def wins(counts: dict[str, float]) -> float:
    """Percentage of `supported` and `small`: the lower bound is above 0."""
    return counts.get("supported", 0.0) + counts.get("small", 0.0)


def error_rate(
    draw: Draw, looks: Sequence[int], level: Level = FIXED, trials: int = 20_000, seed: int = 6
) -> tuple[float, float]:
    """Percentage of trials without effect whose interval excludes 0 upwards, and downwards, at any of the looks."""
    g, up, down = np.random.default_rng(seed), 0, 0
    for _ in range(trials):
        d = draw(g, max(looks))
        for n in looks:
            interval = t_interval(d[:n], level=level)
            if interval.low is not None and (interval.low > 0 or interval.high < 0):  # type: ignore[operator]
                up, down = up + (interval.low > 0), down + (interval.low <= 0)
                break
    return 100 * up / trials, 100 * down / trials


def power(n: int, trials: int = 2_000, seed: int = 7) -> float:
    """Percentage of trials decided upwards when the effect is the one that n seeds are said to detect with 80 %."""
    return wins(words(normal, detectable_effect(n), (n,), trials=trials, seed=seed))


def table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    print(f"\n{title}\n")
    for k, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if k == 0:
            print("|" + "---|" * len(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2_000, help="simulated trials per row that go through decide")
    trials = parser.parse_args().trials

    def three(c: Coverage) -> tuple[str, ...]:
        return f"{c.covered:.1f}", f"{c.too_high:.1f}", f"{c.too_low:.1f}"

    draws = {
        "normal": normal,
        "heavy tails (t, 2 df)": heavy,
        "one seed in three learns": one_in_three,
        "lottery": skewed_lottery,
    }
    head = ("covered %", "low above truth %", "high below truth %")
    rows = [("differences", "seeds", *head)]
    rows += [(name, str(n), *three(seed_coverage(n, draw))) for name, draw in draws.items() for n in (3, 5, 6, 10)]
    table("95 % interval over seeds (20,000 repeats)", rows)
    rows = [("noise", "seeds", *head)]
    rows += [(world, str(n), *three(crossed_coverage(n, world))) for world in WORLDS for n in (3, 5, 10)]
    table("95 % interval over seeds and 60 items (4,000 repeats)", rows)
    over = {
        "normal": normal,
        "t, 3 df": lambda g, n: g.standard_t(3, size=n),
        "lognormal": lambda g, n: np.exp(0.75 * g.normal(size=n)) - np.exp(0.75**2 / 2),
    }
    rows = [("differences", "items", *head)]
    rows += [(name, str(n), *three(item_coverage(n, draw))) for name, draw in over.items() for n in (10, 20, 50, 200)]
    table("95 % interval over items (2,000 repeats)", rows)
    rows = [("differences", "items", *head)]
    rows += [(name, str(n), *three(bca_coverage(n, draw))) for name, draw in over.items() for n in (20, 50, 200)]
    table("BCa alone over items (2,000 repeats)", rows)

    designs: dict[str, tuple[tuple[int, ...], Look | None]] = {
        "3 seeds": ((3,), None),
        "6 seeds": ((6,), None),
        "looks at 3, 5, 8": ((3, 5, 8), Look((3, 5, 8))),
        "every seed from 3 to 10": (tuple(range(3, 11)), Look(tuple(range(3, 11)))),
        "any time, 4 to 12": (tuple(range(4, 13)), Look(None)),
    }
    rows = [("differences", "design", "supported %", "small %", "contradicted %", "inconclusive %")]
    for name, draw in draws.items():
        for design, (looks, look) in designs.items():
            found = words(draw, 0.0, looks, look, trials)
            shown = (f"{found.get(w, 0.0):.1f}" for w in ("supported", "small", "contradicted", "inconclusive"))
            rows.append((name, design, *shown))
    table(f"Verdicts where there is no effect (real `decide`, {trials:,} trials each; margin {MARGIN:g} sd)", rows)
    rows = [("noise", "seeds", "supported or small %", "contradicted %")]
    for world in WORLDS:
        for n in (3, 5):
            found = crossed_words(n, world, trials=trials)
            rows.append((world, str(n), f"{wins(found):.1f}", f"{found.get('contradicted', 0.0):.1f}"))
    table("The same over seeds and 30 items", rows)
    rows = [("design", "supported %")]
    for design, (looks, look) in designs.items():
        rows.append((design, f"{wins(words(normal, -1.0, looks, look, trials, of=SimulatedNonInferiority())):.1f}"))
    table("Non-inferiority where the treatment is worse by exactly the margin (1 sd)", rows)
    rows = [("design", "upwards %", "downwards %")]
    for design, (looks, look) in designs.items():
        up, down = error_rate(normal, looks, look.level if look else FIXED)
        rows.append((design, f"{up:.2f}", f"{down:.2f}"))
    naive = error_rate(normal, tuple(range(3, 21)), trials=5_000)
    rows.append(
        ("95 % interval looked at after every seed from 3 to 20 (do not)", f"{naive[0]:.2f}", f"{naive[1]:.2f}")
    )
    table("Intervals that exclude 0 where there is no effect (20,000 trials)", rows)
    rows = [("seeds", "effect, sd of the difference", "power %")]
    rows += [(str(n), f"{detectable_effect(n):.2f}", f"{power(n, trials):.1f}") for n in (3, 5, 6, 10)]
    table("Power at the effect that is said to be detected with 80 %", rows)


if __name__ == "__main__":
    main()
