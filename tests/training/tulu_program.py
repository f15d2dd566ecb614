"""What the two ranks of test_tulu.py do; each writes what it found and said to RANK.json in the folder given.

torchrun --nproc-per-node 2 -m tests.training.tulu_program FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trialist.training.output import ModelOutput
from trialist.training.tulu import Tulu

SECONDS = 1.5


def slowly(write: Any) -> Any:
    """As a model of some gigabytes is written."""

    def writing(*arguments: Any, **options: Any) -> None:
        time.sleep(SECONDS)
        write(*arguments, **options)

    return writing


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    ModelOutput.write = slowly(ModelOutput.write)  # type: ignore[method-assign]
    options = json.loads((folder / "options.json").read_text())
    said: list[str] = []
    found = Tulu(**{**options, "output": str(folder / "out"), "rlvr_options": ()})(said.append)
    (folder / f"{rank}.json").write_text(json.dumps({"found": dict(found), "said": said}))
    dist.destroy_process_group()
