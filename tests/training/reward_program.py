"""What the two ranks of test_reward_parallel.py do; the first writes its result to result.json in the folder given.

torchrun --nproc-per-node 2 -m tests.training.reward_program FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trialist.training.reward import RewardModelling


def recipe(folder: Path, output: str, **options: Any) -> RewardModelling:
    given = {"steps": 4, "batch": 3, "accumulate": 2, "learning_rate": 3e-3, "checkpoint_every": 3, "log_every": 1,
             "device": "cpu", "validation": 0.2, "donors": 2, "lora": 2}  # fmt: skip
    return RewardModelling(
        str(folder / "model"), str(folder / "prefs.jsonl"), str(folder / output), **{**given, **options}
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = recipe(folder, "two", accumulate=1)(lambda text: None)
    if os.environ["RANK"] == "0":
        (folder / "result.json").write_text(json.dumps(dict(result)))
    dist.destroy_process_group()
