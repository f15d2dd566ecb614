"""Supervised fine-tuning against trl.SFTTrainer: same examples, order, optimizer, schedule and steps; equal losses, then
time, tokens per second and peak memory.

Three comparisons. With the same packed rows both run the same backbone on the same tensors; ours projects only the
tokens that count, TRL without Triton (as on a CPU) all positions, and it measures entropy and accuracy as well. So this gain
need not hold on a GPU. On examples as they come, ours also packs each batch of examples (document masks, no padding) where TRL
pads; once with gradient checkpointing off in TRL, and once on, as its default is, which computes the forward pass twice and
needs less memory for activations. Losses are equal in all of them. bf16, another default of TRL, is off in both.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PrinterCallback, TrainingArguments, get_scheduler

from benchmarks.memory import peak_memory
from benchmarks.models import WIDTH, small_llama
from benchmarks.timer import Limit, Row, compare
from trialist.data.collation import pack_rows, stack_or_pad
from trialist.data.packing import pack_whole
from trialist.data.tokenizers import byte_tokenizer
from trialist.models.flops import flops_per_token
from trialist.objectives import CrossEntropy
from trialist.optimizers import adamw
from trialist.training import ObjectiveTrainer

VOCABULARY, LONGEST, STEPS, RATE = 8192, 512, 3, 1e-3
EXAMPLES, PACKED_ROWS = 8, 4  # in a batch
REPEATS = 20
Example = dict[str, Any]


def model() -> LlamaForCausalLM:
    return small_llama(VOCABULARY, LONGEST)


def examples(count: int) -> list[Example]:
    """Prompts and completions of random tokens; lengths as in chat data, log-normal, most of them well below the longest."""
    draw = np.random.default_rng(0)
    made = []
    for size in np.clip(np.exp(draw.normal(4.8, 0.7, count)).astype(int), 16, LONGEST):
        ids = draw.integers(1, VOCABULARY, size)
        labels = np.where(np.arange(size) < size // 3, -100, ids)
        made.append({"input_ids": ids, "labels": labels})
    return made


def packed_rows() -> list[Example]:
    """Rows of `LONGEST` slots, filled with examples."""
    made = examples(12 * STEPS * PACKED_ROWS)
    counted = [example["labels"] != -100 for example in made]
    rows = pack_whole([example["input_ids"] for example in made], LONGEST, counted=counted)
    batch = rows.rows(slice(0, STEPS * PACKED_ROWS))
    return [{name: column[row].numpy() for name, column in batch.items()} for row in range(STEPS * PACKED_ROWS)]


def options(folder: str, size: int, log: bool) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": size,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1 if log else 100,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def ours(rows: list[Example], size: int, collate: Callable[..., Any], *, log: bool = False) -> list[float]:
    trained = model()
    optimizer = adamw(trained, RATE)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ObjectiveTrainer(
            trained,
            TrainingArguments(**options(folder, size, log)),
            objective=CrossEntropy(),
            data_collator=collate,
            train_dataset=rows,
            optimizers=(optimizer, get_scheduler("linear", optimizer, 0, STEPS)),
        )
        return _losses(trainer)


def theirs(
    rows: list[Example],
    size: int,
    collate: Callable[..., Any] | None,
    *,
    checkpointing: bool = False,
    log: bool = False,
) -> list[float]:
    """TRL on the same rows; without `collate` it pads as it does by default."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trained = model()
    optimizer = adamw(trained, RATE)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            **options(folder, size, log),
            bf16=False,
            gradient_checkpointing=checkpointing,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        trainer = SFTTrainer(
            trained,
            arguments,
            data_collator=collate,
            train_dataset=Dataset.from_list(rows),
            processing_class=byte_tokenizer(),
            optimizers=(optimizer, get_scheduler("linear", optimizer, 0, STEPS)),
        )
        return _losses(trainer)


def _losses(trainer: Any) -> list[float]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def contenders() -> dict[str, dict[str, Callable[..., list[float]]]]:
    """Work -> ours and theirs."""
    packed, loose = packed_rows(), examples(STEPS * EXAMPLES)
    same = functools.partial(ours, packed, PACKED_ROWS, stack_or_pad)
    packs = functools.partial(ours, loose, EXAMPLES, pack_rows)
    return {
        "same packed rows": {
            "sft": same,
            "TRL": functools.partial(theirs, packed, PACKED_ROWS, stack_or_pad),
        },
        "examples as they come": {
            "sft": packs,
            "TRL, no gradient checkpointing": functools.partial(theirs, loose, EXAMPLES, None),
            "TRL, its defaults": functools.partial(theirs, loose, EXAMPLES, None, checkpointing=True),
        },
    }


def rows() -> list[Row]:
    found = []
    size = sum(parameter.numel() for parameter in model().parameters())
    for work, runs in contenders().items():
        losses = {name: torch.tensor(run(log=True)) for name, run in runs.items()}
        for name in runs:
            torch.testing.assert_close(losses[name], losses["sft"], rtol=1e-3, atol=1e-3)
        data = packed_rows() if work == "same packed rows" else examples(STEPS * EXAMPLES)
        tokens = sum(_real(row) for row in data)
        counted = sum(int((row["labels"] != -100).sum()) for row in data)
        result = compare(
            runs,
            work=f"{work}: {STEPS} steps, {tokens:,} tokens of which {counted:,} count, {size / 1e6:.1f}M parameters, fp32",
            repeats=REPEATS,
            limit=limit(size, tokens, counted),
        )
        memory = {name: peak_memory("benchmarks.sft", work, name) for name in runs}
        for peer in list(runs)[1:]:
            row = result.row("sft", peer, at_most=1.0 if work == "same packed rows" else round(1 / 1.3, 3))
            speed = {
                name: f"; {tokens / result.median(name):,.0f} tokens/s, {memory[name]:.0f} MB" for name in ("sft", peer)
            }
            found.append(
                dataclasses.replace(row, measured=row.measured + speed["sft"], against=row.against + speed[peer])
            )
    return found


def _real(row: Example) -> int:
    """Tokens that are not padding: in packed rows a position 0 that no position 1 follows is padding."""
    positions = row.get("position_ids")
    if positions is None:
        return len(row["input_ids"])
    return int(((positions > 0) | (np.append(positions[1:], 0) == 1)).sum())


def limit(size: int, tokens: int, counted: int) -> Limit:
    """Forward and backward products of real tokens, the head where it counts; weights, gradients and moments moved."""
    head = 2 * WIDTH * VOCABULARY
    body = flops_per_token(model(), tokens * 2 // (STEPS * EXAMPLES * 2)) - head
    return Limit(flops=3 * (body * tokens + head * counted), bytes=STEPS * 4 * size * 11)


def measured(work: str, name: str) -> Callable[..., list[float]]:
    """A training run, for its peak memory; what is imported and built once is no part of it."""
    import trl

    assert trl
    run = contenders()[work][name]
    model()
    return run
