"""DPO against trl.DPOTrainer: same pairs, order, reference, optimizer, schedule and steps; equal losses, then time, tokens per
second and peak memory.

One call is a whole short run, the reference's log-probabilities included: TRL computes them in each step, ours before the
first (and keeps them for other methods on the same pairs, which is not counted here). Ours projects only the answers'
tokens, packs sequences, and computes the prompt once for both answers where that takes fewer operations; TRL without Triton
(as on a CPU) projects all positions, also measures entropy and accuracy, pads, and computes the prompt twice. So the first gain
need not hold on a GPU. bf16 and gradient checkpointing, defaults of TRL, are off in both. Ours with prompts computed the
other way, once where it chose twice, shows what the choice gives.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaForCausalLM, PrinterCallback, TrainingArguments, get_scheduler

from benchmarks.memory import peak_memory
from benchmarks.models import WIDTH, small_llama
from benchmarks.timer import Limit, Row, compare
from trialist.data.preferences import PreferencePair
from trialist.data.tokenizers import byte_tokenizer
from trialist.models.flops import flops_per_token
from trialist.objectives import Preference
from trialist.objectives.preference_rows import preference_row, sharing_cost
from trialist.optimizers import adamw
from trialist.training import ObjectiveTrainer, reference_logprobs

VOCABULARY, LONGEST, STEPS, RATE, BETA = 8192, 4096, 3, 1e-3, 0.1


class Pairs(NamedTuple):
    """Of log-normal lengths."""

    prompt: int
    """Median tokens"""
    answer: int
    spread: float
    """Standard deviation of the logarithm"""
    batch: int = 4


WORKS = {
    "long prompts": Pairs(256, 48, 0.3),
    "long answers": Pairs(32, 128, 0.3),
    "answers of 1,000 tokens": Pairs(32, 1000, 0.1, batch=2),
    "lengths as in HH-RLHF": Pairs(82, 29, 1.0),
}
REPEATS = 20
OURS, OTHER, PEER = "preference", "preference, prompts the other way", "trl.DPOTrainer"


def model(seed: int = 0) -> LlamaForCausalLM:
    made = small_llama(VOCABULARY, LONGEST)
    if seed:  # a reference of its own, so that losses begin elsewhere than at ln 2
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return made


def pairs(work: str) -> list[PreferencePair]:
    """Of random tokens."""
    draw = np.random.default_rng(0)
    prompt, answer, spread, batch = WORKS[work]
    made = []
    for row in range(STEPS * batch):
        sizes = np.exp(draw.normal(0, spread, 3)) * (prompt, answer, answer)
        made.append(PreferencePair(*(draw.integers(1, VOCABULARY, max(4, int(size))).tolist() for size in sizes), row))
    return made


def options(folder: str, batch: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def ours(work: str, chosen: bool) -> Callable[[], list[float]]:
    """chosen: with prompts computed as it would choose, else the other way."""
    trained, reference, batch = model(), model(1), WORKS[work].batch
    rows = [preference_row(pair) for pair in pairs(work)]
    share = (sharing_cost(trained, rows, batch) < 1) == chosen
    optimizer = adamw(trained, RATE)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ObjectiveTrainer(
            trained,
            TrainingArguments(**options(folder, batch)),
            objective=Preference("dpo", beta=BETA, share_prompt=share),
            train_dataset=rows,
            optimizers=(optimizer, get_scheduler("linear", optimizer, 0, STEPS)),
        )

    def run() -> list[float]:
        columns = reference_logprobs(reference, rows, batch=batch, share_prompt=share)
        trainer.train_dataset = [{**row, "ref_logprobs": column} for row, column in zip(rows, columns, strict=True)]
        return _losses(trainer)

    return run


def theirs(work: str) -> Callable[[], list[float]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trained = model()
    optimizer = adamw(trained, RATE)
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs(work)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            **options(folder, WORKS[work].batch), bf16=False, gradient_checkpointing=False, beta=BETA, max_length=None
        )
        trainer = DPOTrainer(
            trained,
            ref_model=model(1),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=byte_tokenizer(),
            optimizers=(optimizer, get_scheduler("linear", optimizer, 0, STEPS)),
        )
    trainer.train_dataset = Dataset.from_list(rows)  # the same tokens, which no text of the byte tokenizer would give
    return functools.partial(_losses, trainer)


def _losses(trainer: Any) -> list[float]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def contenders(work: str) -> dict[str, Callable[[], list[float]]]:
    """Name -> a run that returns the losses of its steps."""
    return {OURS: ours(work, True), OTHER: ours(work, False), PEER: theirs(work)}


def rows() -> list[Row]:
    found = []
    size = sum(parameter.numel() for parameter in model().parameters())
    for work in WORKS:
        runs = contenders(work)
        losses = {name: torch.tensor(run()) for name, run in runs.items()}
        for name in runs:
            torch.testing.assert_close(losses[name], losses[PEER], rtol=1e-3, atol=1e-3)
        data = pairs(work)
        prompts = sum(len(pair.prompt) for pair in data)
        answers = sum(len(pair.chosen) + len(pair.rejected) for pair in data)
        result = compare(
            runs,
            work=f"{work}: {STEPS} steps of {WORKS[work].batch} pairs, {prompts:,} tokens of prompts, {answers:,} of answers, "
            f"{size / 1e6:.1f}M parameters, fp32",
            repeats=REPEATS,
            limit=limit(size, prompts, answers, len(data)),
        )
        memory = {name: peak_memory("benchmarks.preference", work, name) for name in runs}
        for name, target in ((OURS, 0.5), (OTHER, None)):
            row = result.row(name, PEER, at_most=target)
            speed = {
                each: f"; {(prompts + answers) / result.median(each):,.0f} tokens/s, {memory[each]:.0f} MB"
                for each in (name, PEER)
            }
            found.append(
                dataclasses.replace(row, measured=row.measured + speed[name], against=row.against + speed[PEER])
            )
    return found


def limit(size: int, prompts: int, answers: int, pairs: int) -> Limit:
    """Policy forward and backward and reference forward: each token once through the body, where it sees half of a prompt
    and an answer on average, and answers through the head."""
    head = 2 * WIDTH * VOCABULARY
    body = flops_per_token(model(), max(1, round((prompts + answers / 2) / pairs / 2))) - head
    return Limit(flops=4 * (body * (prompts + answers) + head * answers), bytes=STEPS * 4 * size * 12)


def measured(work: str, name: str) -> Callable[[], list[float]]:
    """A training run, for its peak memory; what is imported and built once is no part of it."""
    return contenders(work)[name]
