"""The recipe `reward` on two ranks: they share out the prompts of each step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

pytest.importorskip("trl", reason="the extra `trl` is not installed")

from tests.training import reward_program as program
from tests.training.conftest import tiny_llama
from trialist.data.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


def test_two_ranks_train_as_one_process_with_twice_the_micro_batches_does(tmp_path: Path) -> None:
    tiny_llama(vocab_size=259).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{'so ' * (i % 4)}{i}? ", "chosen": "yes" + "!" * (i % 3), "rejected": f"no {i}"} for i in range(31)
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.reward_program", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ranks.returncode == 0, ranks.stderr[-6000:]
    result = program.recipe(tmp_path, "one")(lambda text: None)
    one, two = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")
    )
    start = tiny_llama(vocab_size=259).state_dict()
    moved = max(float((one[name] - start[name]).abs().max()) for name in one if name in start)
    assert moved > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=0.01 * moved, rtol=0)
    both = json.loads((tmp_path / "result.json").read_text())
    for name in ("validation loss before", "validation loss after", "validation accuracy after"):
        assert both[name] == pytest.approx(result[name], abs=2e-4)
