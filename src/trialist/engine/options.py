"""The options that every trial's `plan` and `run` take beside the trial's own inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_SEEDS = 10_000
LAST_SEED = 2**31


@dataclass(frozen=True)
class RunOptions:
    preset: str | None = None
    """Size of the trial: demo, tiny, real, gpu or paper, as far as it has them; without it tiny, else the first"""
    seeds: int | None = None
    """Replicates: training seeds; without it the preset's; 6 for your own model or data, 1 where items are the replicate"""
    seed_start: int = 0
    """First seed"""
    arms: tuple[str, ...] = ()
    """Run these arms only; without it all"""
    margin: float | None = None
    """Smallest effect worth having, in the endpoint's unit; without it the claim's"""
    endpoint: str | None = None
    """Replace the claim's endpoint by another metric of the runs, `name` or `name:higher` or `name:lower`, or by a benchmark
    of the models that they train, such as lm-eval:hellaswag; needs --margin"""
    tune: bool = False
    """Tune all arms again, with equal tries (always on for your own model or data)"""
    until_decided: bool = False
    """Look at the verdict at the declared numbers of seeds and stop when it is decided"""
    looks: str = "3,5,8"
    """Numbers of seeds at which to look with --until-decided, or `any` for an anytime-valid interval"""
    workers: int | None = None
    """Runs at the same time on this machine; without it one a core, at most 4; one a GPU; 1 where time is measured"""
    on: str | None = None
    """Run on a Ray cluster instead, for example ray://head:10001, or `local`; needs trialist[ray]"""
    ledger: str | None = None
    """The ledger file; without it .trialist/ledger.db below the current folder, or below TRIALIST_HOME"""
    output: str | None = None
    """Where the HTML report goes; without it reports/ beside the ledger"""
    max_minutes: float | None = None
    """Stop between runs after so many minutes; the same command goes on later"""
    run_timeout: float | None = None
    """Minutes after which a run is ended and recorded as failed; without it only a long silence ends it"""
    retry: bool = False
    """Run failed runs again"""
    accept_stale: bool = False
    """Take results that an older source of the trial or its parts produced"""
    keep_models: bool = False
    """Keep the trained models (see `trialist export`)"""
    save_evidence: str | None = None
    """Write evidence/TRIAL/NAME.json; NAME is the preset's unless inputs were changed, then it must be given"""
    yes: bool = False
    """Do not ask before work of more than 30 minutes"""

    def __post_init__(self) -> None:
        for name, least, most in (("seeds", 1, MOST_SEEDS), ("workers", 1, None), ("seed_start", 0, LAST_SEED)):
            value, flag = getattr(self, name), name.replace("_", "-")
            if value is not None and value < least:
                raise ValueError(f"--{flag} must be at least {least}, not {value}")
            if value is not None and most is not None and value > most:
                raise ValueError(f"--{flag} must be at most {most}, not {value}")
        if self.margin is not None and not 0 < self.margin < math.inf:
            raise ValueError(f"--margin must be a finite number > 0, not {self.margin}")
        for name in ("max_minutes", "run_timeout"):
            minutes = getattr(self, name)
            if minutes is not None and not minutes > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be > 0, not {minutes}")
        if self.endpoint is not None and self.margin is None:
            raise ValueError(
                "--endpoint replaces the claim's endpoint, so --margin (smallest effect worth having) is required"
            )

    def look_points(self) -> tuple[int, ...] | None:
        """Seeds at which to look; None for `any`."""
        if self.looks == "any":
            return None
        try:
            points = tuple(int(part) for part in self.looks.split(","))
        except ValueError:
            points = ()
        if not points or list(points) != sorted(set(points)) or points[0] < 3:
            raise ValueError(
                f"--looks takes rising numbers of seeds from 3 on, such as 3,5,8, or `any`; not {self.looks!r}"
            )
        return points
