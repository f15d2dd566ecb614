"""What a run may ask of the engine: random streams, shared stages, a scratch folder, and a place to report progress."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trialist.engine import stages


@dataclass
class Context:
    seed: int
    folder: Path
    """Scratch folder of this run; the same one when an interrupted run starts again, so checkpoints in it resume"""
    stages_folder: Path
    threads: int = 1
    source: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    keep_model: bool = False
    """Whether the run should leave its trained model in `model_folder` (`run --keep-models`, `export`)"""
    send: Callable[[tuple], None] | None = None
    used_stages: list[str] = field(default_factory=list)
    elsewhere: tuple[float, float] = (0.0, 0.0)
    """Wall and CPU seconds to add to what the clock says of this run, so that each stage it used counts in full, whoever built
    it, and waiting for one does not"""

    def stream(self, name: str) -> int:
        """A seed in [0, 2**63) for one named use of randomness (`init`, `data_order`, `dropout`, `sampling`, `evaluation`).

        It depends on the run's seed and the name only, never on the arm: arms share their random numbers.
        """
        key = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(key, "little") >> 1

    def stage(self, name: str, inputs: tuple, build: Callable[[Path], Any]) -> Path:
        """The folder of an artefact that arms share; `build(folder)` fills it if it is not there yet."""
        before, self.elsewhere = self.elsewhere, (0.0, 0.0)  # stages within this one correct its own cost
        wall, cpu = time.perf_counter(), time.process_time()
        folder = stages.stage(
            self.stages_folder, name, inputs, build, source=self.source, versions=self.versions, waiting=self.alive,
            elsewhere=lambda: self.elsewhere,
        )  # fmt: skip
        spent = time.perf_counter() - wall, time.process_time() - cpu
        whole = (0.0, 0.0) if folder.name in self.used_stages else stages.cost(folder)
        self.elsewhere = before[0] + whole[0] - spent[0], before[1] + whole[1] - spent[1]
        self.used_stages.append(folder.name)
        return folder

    def progress(self, done: float, total: float, numbers: Mapping[str, float] | None = None) -> None:
        """Tells the table how far the run is, in any unit, with numbers worth showing (`loss`)."""
        if self.send is not None:
            self.send(
                ("progress", float(done), float(total), {key: float(value) for key, value in (numbers or {}).items()})
            )

    def alive(self) -> None:
        """A sign of life without progress, while the run waits for another one (a stage that is being built)."""
        if self.send is not None:
            self.send(("alive",))

    @property
    def model_folder(self) -> Path:
        """Where a run saves its trained model when `keep_model` is set."""
        return self.folder / "model"
