"""fit against transformers.Trainer: same model, data, optimizer, schedule and steps; equal losses, then time.

Two workloads: one where every token counts and both do the same work, and one of prompts and completions, where only a
quarter of the tokens count and fit projects those alone.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, get_scheduler

from benchmarks.models import WIDTH, small_llama
from benchmarks.timer import Limit, Row, compare
from trialist.models.flops import flops_per_token
from trialist.objectives import CrossEntropy
from trialist.optimizers import adamw
from trialist.training import fit

VOCABULARY, ROWS, LENGTH, ACCUMULATE, STEPS = 4096, 8, 128, 2, 5
CLIP, RATE = 1.0, 1e-3
Batch = dict[str, Tensor]


def model() -> LlamaForCausalLM:
    return small_llama(VOCABULARY, LENGTH)


def batches(prompt: int) -> Callable[[int], Batch]:
    """Rows of random tokens whose first `prompt` tokens do not count."""

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        input_ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
        labels = input_ids.clone()
        labels[:, :prompt] = -100
        return {"input_ids": input_ids, "labels": labels}

    return batch


def ours(data: Callable[[int], Batch]) -> list[float]:
    trained = model()
    result = fit(
        trained,
        data,
        CrossEntropy(),
        adamw(trained, RATE),
        "linear",
        {"steps": STEPS},
        accumulate=ACCUMULATE,
        clip=CLIP,
        progress=False,
    )
    return list(result.losses)


def theirs(data: Callable[[int], Batch], *, log: bool = False) -> list[float]:
    """The Trainer on the same rows in the same order; with `log` it returns the loss of every step."""
    trained = model()
    optimizer = adamw(trained, RATE)
    schedule = get_scheduler("linear", optimizer, 0, STEPS)
    parts = [data(index) for index in range(STEPS * ACCUMULATE)]
    rows = [{name: part[name][row] for name in part} for part in parts for row in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=ACCUMULATE,
            max_grad_norm=CLIP,
            train_sampling_strategy="sequential",
            logging_steps=1 if log else 10,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(trained, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows() -> list[Row]:
    found = []
    size = sum(parameter.numel() for parameter in model().parameters())
    for name, prompt in (("every token counts", 0), ("a quarter of the tokens counts", 3 * LENGTH // 4)):
        data = batches(prompt)
        torch.testing.assert_close(torch.tensor(ours(data)), torch.tensor(theirs(data, log=True)), rtol=1e-3, atol=1e-3)
        result = compare(
            {"fit": functools.partial(ours, data), "transformers.Trainer": functools.partial(theirs, data)},
            work=f"{STEPS} steps of {ACCUMULATE} x {ROWS} x {LENGTH} tokens, {size / 1e6:.1f}M parameters, fp32, {name}",
            limit=limit(size, scored=(LENGTH - max(prompt, 1)) / LENGTH),
        )
        found.append(result.row("fit", "transformers.Trainer", at_most=1.0))
    return found


def limit(size: int, scored: float) -> Limit:
    """Forward and backward products, the head at scored positions alone; weights, gradients and Adam's moments moved."""
    head = 2 * WIDTH * VOCABULARY
    per_token = flops_per_token(model(), LENGTH) - (1 - scored) * head
    moved = 4 * size * (2 * ACCUMULATE + 2 * ACCUMULATE + 7)  # read twice and added to per micro-batch; the update
    return Limit(flops=3 * per_token * STEPS * ACCUMULATE * ROWS * LENGTH, bytes=STEPS * moved)
