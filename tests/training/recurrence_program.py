"""What the two ranks of test_recurrence_parallel.py do; each writes what it saw to RANK.json in the folder given.

torchrun --nproc-per-node 2 -m tests.training.recurrence_program FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.training.conftest import VOCABULARY
from tests.training.test_recurrence import Watch, recurrent_model
from trialist.objectives import CrossEntropy
from trialist.optimizers import adamw
from trialist.training import RecurrenceCallback, fit
from trialist.training.parallel import initialize_from_torchrun


class Apart(TrainerCallback):
    """Each rank counts the training passes in its own way, as ranks do that made different numbers of them."""

    def on_step_begin(self, args, state, control, model=None, **objects):
        model.model.layers.passes.fill_(state.global_step + 5 * dist.get_rank())


def train(batches, callback, kind):
    model = recurrent_model()
    watch = Watch(model)
    result = fit(
        model, batches, CrossEntropy(), adamw(model, 1e-2), "constant", {"steps": 4}, accumulate=2, seed=3, parallel=kind,
        callbacks=[callback], progress=False, divergence_margin=float("inf"),
    )  # fmt: skip
    return result.losses, watch.passes, [float(p.double().abs().sum()) for p in model.parameters()]


def refusal(batches):
    try:
        train(batches, Apart(), "ddp")
    except ValueError as error:
        return str(error)
    return ""


def batches(index):
    """Two rows of eleven tokens."""
    ids = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1000 + index))
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    initialize_from_torchrun()
    losses, passes, weights = train(batches, RecurrenceCallback(), "ddp")
    seen = {"losses": losses, "passes": passes, "weights": weights, "refusal": refusal(batches)}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
