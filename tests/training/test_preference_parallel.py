"""The recipe `preference` on two ranks: they share out the reference's pass and the pairs of each step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training import preference_program as program
from tests.training.conftest import tiny_llama
from trialist.data.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
PAIRS = 30
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have trained `two`, beside what each of them has seen."""
    made = tmp_path_factory.mktemp("ranks")
    tiny_llama(vocab_size=259).save_pretrained(made / "model")
    byte_tokenizer().save_pretrained(made / "model")
    rows = [
        {"prompt": f"{'so ' * (i % 4)}{i}? ", "chosen": "yes" + "!" * (i % 3), "rejected": "no"} for i in range(PAIRS)
    ]
    (made / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIALIST_CACHE": str(made / "cache")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.preference_program", str(made)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-6000:]
    return made


def seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_each_rank_scores_other_pairs_and_none_is_scored_twice(folder: Path) -> None:
    parts = [rank["scored"] for rank in seen(folder)]
    assert all(parts)
    assert sorted(index for own in parts for part in own for index in part) == list(range(PAIRS))


def test_two_ranks_train_as_one_process_with_twice_the_micro_batches_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALIST_CACHE", str(folder / "cache"))
    result = program.recipe(folder, "one")(lambda _: None)
    one, two, start = (
        AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("one", "two", "model")
    )
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=0.01 * moved, rtol=0)
    for rank in seen(folder):
        for name in ("validation loss before", "validation loss after", "validation accuracy after"):
            assert rank["result"][name] == pytest.approx(result[name], abs=2e-4)


def test_only_the_first_rank_speaks(folder: Path) -> None:
    said = [rank["said"] for rank in seen(folder)]
    assert any(line.startswith("step 4/4") for line in said[0])
    assert said[1] == []
