"""A trial that another package brings: do weighted coins land on heads more often? It needs nothing but numpy."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Items, Outcome, Trial, Tuning


@dataclass(frozen=True)
class CoinsTrial(Trial):
    """Do weighted coins land on heads more often than fair ones?"""

    claim = Claim(
        statement="At equal throws, a weighted coin shows heads more often.",
        source="arXiv:0000.00000",
        reported="+20 points",
        endpoint=Endpoint("heads", unit="share", better="higher", margin=0.05),
        secondary=(Endpoint("longest_streak", unit="throws"),),
    )
    budget = Budget("steps")
    tuning = Tuning(tries=2, metric=Endpoint("practice_heads"), seeds=(1001, 1002))
    presets = {"demo": {"throws": 50, "seeds": 3, "about": "seconds"}, "tiny": {"throws": 400, "seeds": 6}}
    usage = "from trialist_coins import throw\nthrow(0.5, 100, seed=0)"

    throws: int = 400
    """Coins thrown per run"""
    bias: float = 0.2
    """Added to the weighted coin's probability of heads; 0 is the fair coin"""
    data: str = "mint"
    """Where the coins come from: `mint`, or a file whose first line is the fair coin's probability of heads"""
    tuned: bool = False
    """Whether the arms have a knob to tune"""
    crash: str = ""
    """Arm that crashes: `ARM` raises, `ARM:kill` dies by a signal, `ARM:hang` falls silent, `ARM:diverge` diverges"""
    hand: float = 0.01
    """Standard deviation between throwers: noise that arms do not share"""
    seconds: float = 0.0
    """Seconds that a run takes"""

    def check(self) -> None:
        if self.data != "mint" and not Path(self.data).is_file():
            raise FileNotFoundError(f"--data {self.data}: no such file")

    def digests(self) -> Mapping[str, str]:
        return {} if self.data == "mint" else {"data": Path(self.data).read_text()}

    def arms(self) -> Iterator[Arm]:
        knob = {"spin": (0.0, 0.1)} if self.tuned else None
        for setting, null in (("table", False), ("glued", True)):
            yield Arm("fair", "control", setting, null, options={"bias": 0.0, "spin": 0.0}, tune=knob)
            yield Arm("old", "control", setting, null, options={"bias": 0.0, "spin": 0.0}, tune=knob)
            yield Arm("weighted", "treatment", setting, null, options={"bias": self.bias, "spin": 0.0}, tune=knob)

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        import numpy as np

        name, _, mode = self.crash.partition(":")
        if name == arm.name and arm.setting == "table":
            if mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if mode == "hang":
                time.sleep(3600)
            if mode == "diverge":
                return Outcome(diverged="no coin left at throw 3", cost=Cost(steps=3))
            if not mode:
                raise RuntimeError("the coin rolled under the sofa")
        fair = 0.5 if self.data == "mint" else float(Path(self.data).read_text().split()[0])
        bias = 0.0 if arm.setting == "glued" else arm["bias"]
        generator = np.random.default_rng(context.stream("throws"))
        thrower = np.random.default_rng(context.stream(f"hand of {arm.name} at the {arm.setting}"))
        worth = fair + bias - arm["spin"] + 0.02 * generator.standard_normal(self.throws)
        worth = worth + self.hand * thrower.standard_normal()
        for part in range(1, 11):
            time.sleep(self.seconds / 10)
            context.progress(part * self.throws / 10, self.throws, {"heads": float(worth.mean())})
        curve = tuple(
            (float(n), float(worth[:n].mean())) for n in range(10, self.throws + 1, max(10, self.throws // 10))
        )
        return Outcome(
            metrics={"heads": float(worth.mean()), "longest_streak": 3.0, "practice_heads": float(worth[:10].mean())},
            items={"heads": Items(tuple(str(i) for i in range(self.throws)), tuple(worth.tolist()))},
            curves={"heads": curve},
            cost=Cost(steps=self.throws),
        )


def throw(heads: float, throws: int, seed: int) -> list[bool]:
    import numpy as np

    return (np.random.default_rng(seed).random(throws) < heads).tolist()
