"""A trial that misbehaves on request, for the tests of what the engine survives: it has a stage, checkpoints and knobs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Trial, Tuning
from trialist.engine.home import write_atomic

STEPS = 5


@dataclass(frozen=True)
class DiceTrial(Trial):
    """Do loaded dice show more eyes than fair ones?"""

    claim = Claim(
        statement="At equal rolls, a loaded die shows more eyes.",
        source="arXiv:0000.00000",
        reported="+1 eye",
        endpoint=Endpoint("eyes", unit="eyes", better="higher", margin=0.1),
    )
    budget = Budget("steps")
    tuning = Tuning(tries=2, metric=Endpoint("practice_eyes"), seeds=(1001,))
    presets = {"tiny": {"seeds": 3}}
    preload = ("numpy", "safetensors.numpy")

    rolls: int = 60
    """Rolls per run"""
    seconds: float = 0.0
    """Seconds that a run takes"""
    building: float = 0.0
    """Seconds that it takes to cast the dice"""
    fault: str = ""
    """What the loaded die does: `memory`, `memory-error`, `child` (starts two and falls silent), `child-alone` (is
    killed and leaves one), `stuck` (never lets go of
    the interpreter), `silent`, `nan` (measures no number), `folder-full`, `stage-full`"""

    def arms(self) -> Iterator[Arm]:
        for name, role, extra in (("fair", "control", 0.0), ("loaded", "treatment", 0.5)):
            yield Arm(name, role, options={"extra": extra, "shake": 0.0}, tune={"shake": (0.0, 0.01)})

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        import numpy as np
        from safetensors.numpy import load_file, save

        with alone_in(context.folder):
            if arm.name == "loaded" and self.fault:
                misbehave(self.fault, context)
            die = load_file(context.stage("die", (self.rolls, seed), self.cast) / "die.safetensors")["eyes"]
            checkpoint = context.folder / "state.safetensors"
            state = load_file(checkpoint) if checkpoint.is_file() else {"seen": np.zeros(0)}
            for step in range(len(state["seen"]) + 1, STEPS + 1):
                time.sleep(self.seconds / STEPS)
                throw = np.random.default_rng(context.stream(f"throw {step}"))
                seen = throw.choice(die, self.rolls).mean() + arm["extra"] - arm["shake"]
                state = {"seen": np.append(state["seen"], seen)}
                write_atomic(checkpoint, save(state))
                write_atomic(context.folder / "state.json", json.dumps({"step": step}))
                context.progress(step, STEPS, {"eyes": float(seen)})
        hand = np.random.default_rng(context.stream(f"hand of {arm.name}")).normal(0, 0.01)
        eyes = float("nan") if arm.name == "loaded" and self.fault == "nan" else float(state["seen"].mean() + hand)
        return Outcome({"eyes": eyes, "practice_eyes": eyes}, cost=Cost(steps=len(state["seen"])))

    def cast(self, folder: Path) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        (folder / "mould.json").write_text(json.dumps({"rolls": self.rolls}))
        time.sleep(self.building)
        save_file({"eyes": np.arange(1.0, 7.0)}, folder / "die.safetensors")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises RuntimeError where another process works on the same run."""
    with open(folder / "occupied", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError("two processes work on one run") from error
        yield


def misbehave(fault: str, context: Context) -> None:
    if fault == "memory":
        hoard = []
        while True:
            hoard.append(bytearray(8 << 20))
            context.progress(len(hoard), 1e9)
            time.sleep(0.005)
    if fault == "memory-error":
        bytearray(1 << 60)
    if fault == "child-alone":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "child":
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        subprocess.Popen(sleeper, start_new_session=True)
        subprocess.Popen(sleeper)
        time.sleep(600)
    if fault == "stuck":
        context.progress(1, 2)
        re.match(r"(a+)+$", "a" * 60 + "b")
    if fault == "silent":
        time.sleep(600)
    if fault == "folder-full":
        write_atomic(context.folder / "large.bin", os.urandom(8 << 20))
    if fault == "stage-full":
        context.stage("large", (), cast_large)


def cast_large(folder: Path) -> None:
    for part in range(8):
        (folder / f"{part}.bin").write_bytes(os.urandom(1 << 20))
