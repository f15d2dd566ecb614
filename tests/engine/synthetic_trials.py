"""Trials, runs and verdicts made by hand, for the tests of summaries, reports and evidence."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Saving, Trial
from trialist.engine.records import Effect, RunRecord, Verdict
from trialist.engine.summary import summarize

BPB = Endpoint("bits_per_byte", unit="bits per byte", better="lower", margin=0.02)


class Recorded(Trial):
    """A trial whose arms and runs are written down by the tests."""

    def arms(self):
        yield from ()

    def run(self, arm, seed, context):
        return Outcome()


@dataclass(frozen=True)
class SelectiveTrial(Recorded):
    """Does letting tokens mask others lower bits per byte at equal tokens?"""

    claim = Claim(
        "At equal tokens a transformer with selective attention predicts better than one with standard attention.",
        "arXiv:2410.02703",
        "Equals standard attention with about twice the heads and parameters; perplexity on C4 18.07 against 18.61",
        BPB,
        secondary=(Endpoint("loss", unit="nats"),),
    )
    budget = Budget("tokens")
    steps: int = 200


@dataclass(frozen=True)
class CacheTrial(Recorded):
    """Is a smaller cache as good?"""

    claim = Claim(
        "Keeping half of the cache by key norm answers as well.",
        "arXiv:2406.11430",
        "No loss at 50 % on language modelling, 90 % on needle tasks",
        Endpoint("accuracy", unit="points", better="higher", margin=1.0),
        guards=(Endpoint("format", better="higher", margin=0.05),),
        kind="non-inferiority",
        saving=Saving("peak_bytes", 0.2),
    )
    budget = Budget("generated_tokens")
    replicate = "item"


def effect(control: str, value: float | None, half: float | None, n: int = 6, **more: Any) -> Effect:
    given = dict(endpoint="bits_per_byte", setting="main", method=f"paired t over seeds, df {n - 1}", margin=0.02)
    spread = (None, None) if value is None or half is None else (value - half, value + half)
    return Effect(control=control, effect=value, low=spread[0], high=spread[1], n=n, **{**given, **more})


def run(
    arm: str,
    seed: int,
    value: float | None,
    setting: str = "main",
    *,
    curve: bool = True,
    seconds: float = 60.0,
    **more: Any,
) -> RunRecord:
    """A finished run whose curve falls towards `value`."""
    noise = random.Random(f"{arm} {seed} {setting}")
    points = (
        tuple((i * 4096.0, value + 5 * 0.82**i + noise.gauss(0, 0.01)) for i in range(1, 41))
        if curve and value is not None
        else ()
    )
    outcome = Outcome(
        metrics={} if value is None else {"bits_per_byte": value},
        curves={"bits_per_byte": points} if points else {},
        cost=Cost(tokens=819_200, steps=200, flops=4.2e12),
        undefined={} if value is not None else {"bits_per_byte": "no test bytes"},
        **(more.pop("outcome", None) or {}),
    )
    failed = more.get("status") == "failed"
    given: dict[str, Any] = dict(
        status="done",
        outcome=None if failed else outcome,
        measured={"wall_seconds": seconds, "cpu_seconds": seconds * 0.97, "peak_bytes": 7.1e8},
    )
    return RunRecord(
        f"{arm}-{setting}-{seed}".replace(" ", "_"), "selective-attention", arm, setting, seed, **{**given, **more}
    )


ARMS = (
    Arm(
        "standard attention",
        "control",
        about="softmax attention, everything else equal",
        options=dict(attention="full", heads=4),
    ),
    Arm("standard attention, twice the heads", "control", options=dict(attention="full", heads=8)),
    Arm("selective attention", "treatment", options=dict(attention="selective", heads=4)),
    Arm("standard attention", "control", "shuffled bytes", null=True, options=dict(attention="full", heads=4)),
    Arm("selective attention", "treatment", "shuffled bytes", null=True, options=dict(attention="selective", heads=4)),
)
CENTRES = {
    ("main", "standard attention"): 3.42,
    ("main", "standard attention, twice the heads"): 3.38,
    ("main", "selective attention"): 3.115,
    ("shuffled bytes", "standard attention"): 4.548,
    ("shuffled bytes", "selective attention"): 4.549,
}


def runs(
    seeds: int = 6, centres: dict[tuple[str, str], float] = CENTRES, noise: float = 0.02, curve: bool = True
) -> list[RunRecord]:
    found = []
    for (setting, arm), centre in centres.items():
        for seed in range(seeds):
            shared = random.Random(f"{seed} {setting}").gauss(0, noise)
            value = centre + shared + random.Random(f"{arm} {seed} {setting}").gauss(0, noise / 2)
            found.append(run(arm, seed, value, setting, curve=curve, seconds=66.0 if arm.startswith("sel") else 54.0))
    return found


SUPPORTED = Verdict(
    word="supported",
    reason="Against every control the lower bound is above 0 and the estimate reaches the margin.",
    sentence="Over training seeds, on the standard library's text, selective attention lowers bits per byte by 0.265, "
    "at least 0.251, against standard attention with twice the heads.",
    advice="Use it: the gain is thirteen times the margin, for 1.22 times the training time.",
    trial="selective-attention",
    treatment="selective attention",
    setting="main",
    effects=(
        effect("standard attention", 0.305, 0.018, treatment_mean=3.115, control_mean=3.42, correlation=0.81),
        effect("standard attention, twice the heads", 0.265, 0.014, treatment_mean=3.115, control_mean=3.38),
    ),
    null_effects=(effect("standard attention", -0.001, 0.006, setting="shuffled bytes", null_word="shown null"),),
    secondary=(effect("standard attention", 0.2, 0.05, endpoint="loss"),),
    threats=("One thread trained every run: time ratios are those of this machine.",),
    cost_ratio={"tokens": 1.0, "flops": 1.02, "wall_seconds": 1.22},
    cost_equivalent="Standard attention needs about 2.4 times the tokens for the same bits per byte.",
)


def document(
    verdict: Verdict = SUPPORTED,
    records: list[RunRecord] | None = None,
    arms: tuple[Arm, ...] = ARMS,
    trial: Trial | None = None,
    **more: Any,
) -> dict[str, Any]:
    given: dict[str, Any] = dict(
        inputs={"model": "modular-decoder", "data": "python-stdlib", "steps": 200, "learning_rate": 3e-3},
        versions={"python": "3.11.9", "trialist": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        hardware={
            "processor": "AMD EPYC 7B13",
            "cores": 2,
            "memory_gib": 7.7,
            "accelerators": [],
            "system": "Linux x86_64",
        },
        command="trialist run selective-attention --preset tiny --seeds 6 --save-evidence",
        date="2026-08-01",
        tuning={
            "tries": 6,
            "metric": "validation_bits_per_byte",
            "seeds": [1001, 1002],
            "chosen": {"selective attention": {"learning_rate": 0.003}},
        },
        margin=None,
        endpoint=None,
        full_trial_command=None,
        stages=[],
    )
    records = runs() if records is None else records
    return summarize(
        trial or SelectiveTrial(),
        verdict.trial,
        more.pop("preset", "tiny"),
        arms,
        records,
        verdict,
        **{**given, **more},
    )


def contradicted() -> dict[str, Any]:
    """Worse than one control; one negative control undecided; ten controls with long names."""
    names = [
        f"control number {i} whose name goes on about what it keeps equal and what it does not" for i in range(1, 9)
    ]
    arms = (*[Arm(name, "control") for name in names], Arm("selective attention", "treatment"))
    centres = {("main", name): 3.1 + 0.012 * i for i, name in enumerate(names)} | {
        ("main", "selective attention"): 3.15
    }
    verdict = dataclasses.replace(
        SUPPORTED,
        word="contradicted",
        reason=f"Against {names[0]} the interval excludes 0 the other way and the estimate is worse by more than the margin.",
        sentence="Over training seeds, selective attention raises bits per byte by 0.050, at least 0.029.",
        advice="Do not use it at this scale.",
        effects=tuple(effect(name, -0.05 + 0.012 * i, 0.021 + 0.002 * i) for i, name in enumerate(names)),
        null_effects=(),
        threats=("Control 3 has 4 % more parameters.", "Three seeds only."),
        cost_equivalent=None,
        trial="selective-attention-with-a-rather-long-name",
    )
    return document(
        verdict, runs(6, centres), arms, full_trial_command="trialist run selective-attention --preset tiny --seeds 6"
    )


def inconclusive() -> dict[str, Any]:
    verdict = dataclasses.replace(
        SUPPORTED,
        word="inconclusive",
        reason="Undecided: bits per byte against standard attention, twice the heads.",
        sentence="Over training seeds, 3 seeds cannot tell whether selective attention lowers bits per byte by 0.02.",
        advice="Run 4 more seeds (about 9 minutes).",
        effects=(
            effect("standard attention", 0.031, 0.052, n=3),
            effect(
                "standard attention, twice the heads",
                None,
                None,
                n=3,
                reason="the three differences are equal bit for bit",
            ),
        ),
        more_seeds=4,
        trial="selective-recall",
    )
    centres = CENTRES | {("main", "selective attention"): 3.39}
    return document(
        verdict,
        runs(3, centres, noise=0.05),
        full_trial_command="trialist run selective-recall --preset tiny --seeds 6",
        preset="demo",
    )


def void() -> dict[str, Any]:
    """One run failed, two diverged, one without a value."""
    records = [
        record
        for record in runs()
        if (record.arm, record.setting, record.seed)
        not in {
            ("standard attention", "main", 4),
            ("selective attention", "main", 1),
            ("selective attention", "main", 2),
            ("selective attention", "main", 5),
        }
    ]
    records += [
        run(
            "standard attention",
            4,
            None,
            status="failed",
            error="MemoryError: worker used 7.9 GiB of 7.7 GiB",
            traceback='Traceback (most recent call last):\n  File "<trial>", line 3, in run\nMemoryError',
        ),
        run(
            "selective attention",
            1,
            float("nan"),
            curve=False,
            status="diverged",
            outcome=dict(diverged="loss NaN at step 37"),
        ),
        run(
            "selective attention",
            2,
            9.0,
            status="diverged",
            outcome=dict(diverged="loss 9.0 above its start 8.0 at step 200"),
        ),
        run("selective attention", 5, None),
    ]
    verdict = dataclasses.replace(
        SUPPORTED,
        word="void",
        reason="A run is missing: standard attention, seed 4 failed.",
        sentence="No verdict: one run of standard attention failed, so the arms were not compared on the same seeds.",
        advice="Run `trialist run selective-attention --retry`.",
        effects=(effect("standard attention", None, None, n=0, reason="a run is missing"),),
        divergences={"selective attention": 2},
        cost_ratio={},
    )
    return document(verdict, records, stages=[{"name": "base", "seed": 0, "wall_seconds": 340.2, "bytes": 91_000_000}])


def non_inferior() -> dict[str, Any]:
    arms = (Arm("full cache", "control"), Arm("random eviction", "reference"), Arm("key norm", "treatment"))
    noise = random.Random(3)
    ids = tuple(f"gsm8k/{i}" for i in range(200))
    records = []
    for arm, rate in (("full cache", 0.52), ("random eviction", 0.2), ("key norm", 0.515)):
        scores = tuple(float(noise.random() < rate) for _ in ids)
        outcome = Outcome(
            {"accuracy": 100 * sum(scores) / 200, "format": 0.9},
            {"accuracy": Items(ids, scores)},
            {},
            Cost(generated_tokens=51_200),
        )
        records.append(
            RunRecord(
                f"run-{arm}",
                "key-norm",
                arm,
                "main",
                0,
                "done",
                outcome,
                {"wall_seconds": 400.0, "peak_bytes": 2e9 if arm == "full cache" else 1.2e9},
            )
        )
    common = dict(endpoint="accuracy", margin=1.0, method="BCa over 200 items")
    verdict = Verdict(
        "supported",
        "Quality holds within 1 point and the saving reaches 20 %.",
        "For this model, over prompts, half of the cache answers as well: accuracy within 1 point, with 40 % less memory.",
        "Use it where memory is short.",
        "key-norm",
        "key norm",
        "main",
        effects=(effect("full cache", -0.1, 0.7, n=200, **common),),
        guards=(effect("full cache", 0.0, 0.01, n=200, **{**common, "endpoint": "format", "margin": 0.05}),),
        savings=(effect("full cache", 0.4, 0.01, n=200, **{**common, "endpoint": "peak_bytes", "margin": 0.2}),),
        references=(effect("random eviction", 31.5, 6.0, n=200, **common),),
        cost_ratio={"peak_bytes": 0.6, "wall_seconds": 0.98},
    )
    return document(verdict, records, arms, CacheTrial())
