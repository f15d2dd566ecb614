"""Recurrent depth on two ranks: they draw the same number of steps, or the run says which they drew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import recurrence_program as program
from tests.training.test_recurrence import drawn
from trialist.training import RecurrenceCallback

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "INFO"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.recurrence_program", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_with_the_callback_both_ranks_draw_by_the_step(ranks) -> None:
    for rank in ranks:
        assert rank["passes"][-4:] == [drawn(step) for step in range(4)]
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_two_ranks_train_as_one_process_does(ranks) -> None:
    losses, passes, weights = program.train(program.batches, RecurrenceCallback(), None)
    assert passes[-8:] == [drawn(step) for step in range(4) for _ in range(2)]
    assert ranks[0]["losses"] == pytest.approx(losses, abs=1e-5)
    assert ranks[0]["weights"] == pytest.approx(weights, rel=1e-4)


def test_ranks_that_drew_different_numbers_of_steps_are_told_so(ranks) -> None:
    for rank in ranks:
        assert rank["refusal"].startswith(f"the ranks drew [{drawn(0)}, {drawn(5)}] steps for one training pass")
        assert "use RecurrenceCallback" in rank["refusal"]
