"""What the two ranks of test_preference_parallel.py do; each writes which parts it scored to RANK.json in the folder given.

torchrun --nproc-per-node 2 -m tests.training.preference_program FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trialist.training import preference_reference
from trialist.training.preference import PreferenceTraining

PART = 5


def recipe(folder: Path, output: str, **options: Any) -> PreferenceTraining:
    given = {"objective": "d2po", "steps": 4, "batch": 3, "accumulate": 2, "learning_rate": 3e-3, "checkpoint_every": 3,
             "log_every": 1, "device": "cpu", "validation": 0.2}  # fmt: skip
    return PreferenceTraining(
        str(folder / "model"), str(folder / "prefs.jsonl"), str(folder / output), **{**given, **options}
    )


def watched(folder: Path, rank: str, scored: list[list[int]]) -> None:
    """Each rank waits with its first part until the other has one, too."""
    preference_reference.PART = PART
    score = preference_reference._Reference.__call__

    def watching(reference: Any, part: Any) -> Any:
        (folder / f"{rank}.begun").touch()
        deadline = time.monotonic() + 120
        while not all((folder / f"{other}.begun").exists() for other in range(2)) and time.monotonic() < deadline:
            time.sleep(0.05)
        scored.append([int(index) for index in part])
        return score(reference, part)

    preference_reference._Reference.__call__ = watching


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    scored: list[list[int]] = []
    said: list[str] = []
    watched(folder, rank, scored)
    result = recipe(folder, "two", accumulate=1)(said.append)
    (folder / f"{rank}.json").write_text(json.dumps({"scored": scored, "said": said, "result": dict(result)}))
    dist.destroy_process_group()
