"""Reward modelling against trl.RewardTrainer fed the exploded list of pairs: same anchors, order, optimizer, schedule and steps.

An anchor with the answers of two donors has 15 pairs of 6 sequences. TRL scores both sequences of every pair, 30 of them; ours
scores the 6. Three works: the nine pairs with a certain winner, which TRL trains with the same loss (asserted), these with the
lengths of HH-RLHF, long prompts and short answers of very different length, where padding is most of a micro-batch, and
all fifteen, of which TRL takes the six ties for wins: the same work, another loss, so our own loss pair by pair stands in for the
assertion. With one pair a prompt grouping saves nothing. Gradient checkpointing and bf16, defaults of TRL, are off in both.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PrinterCallback, get_scheduler

from benchmarks.memory import peak_memory
from benchmarks.timer import Limit, Row, compare
from trialist.data.preferences import PreferencePair
from trialist.data.reward_groups import group_pairs
from trialist.data.tokenizers import byte_tokenizer
from trialist.models.flops import flops_per_token
from trialist.optimizers import adamw

VOCABULARY, LONGEST, STEPS, RATE = 8192, 1024, 2, 1e-4
ANCHORS = 2  # in a step
REPEATS = 20
PAD = 258
OURS, APART, TRL = "reward, grouped", "reward, pair by pair", "trl.RewardTrainer on exploded pairs"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens, log-normal: the logarithms of their medians, and the spread of the logarithm."""

    prompt: float = 4.0
    answer: float = 4.4
    spread: float = 0.5
    ties: bool = False


WORKS = {
    "nine certain pairs": Lengths(),
    "nine certain pairs, lengths of HH-RLHF": Lengths(prompt=4.9, answer=3.4, spread=1.0),
    "fifteen pairs with ties": Lengths(ties=True),
}


def model() -> LlamaForSequenceClassification:
    """Four layers of width 128; the same initial weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LONGEST, num_labels=1, pad_token_id=PAD, use_cache=False,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def pairs_of(work: Lengths) -> tuple[list[PreferencePair], list[float], list[int]]:
    """Pairs, labels and anchors of random tokens."""
    draw = np.random.default_rng(0)

    def tokens(mean: float) -> list[int]:
        length = int(np.clip(np.exp(draw.normal(mean, work.spread)), 8, LONGEST // 2 - 1))
        return [token for token in draw.integers(1, VOCABULARY, length).tolist() if token != PAD]

    pairs, labels, anchors = [], [], []
    for anchor in range(STEPS * ANCHORS):
        prompt, answers = tokens(work.prompt), [tokens(work.answer) for _ in range(6)]
        for i in range(6):
            for j in range(i + 1, 6):
                certain = i < 2  # the first two are the anchor's own
                if certain or work.ties:
                    pairs.append(PreferencePair(prompt, answers[i], answers[j], len(pairs)))
                    labels.append(1.0 if certain else 0.5)
                    anchors.append(anchor)
    return pairs, labels, anchors


def options(folder: str, batch: int, log: bool) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": batch, "train_sampling_strategy": "sequential",
        "logging_steps": 1 if log else 100, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "bf16": False, "gradient_checkpointing": False, "max_length": None,
    }  # fmt: skip


def ours(work: Lengths, share: bool, *, log: bool = False) -> list[float]:
    from trialist.training.reward_trainer import RobustRewardTrainer

    pairs, labels, anchors = pairs_of(work)
    return _run(RobustRewardTrainer, group_pairs(pairs, labels, anchors=anchors, share=share), ANCHORS, log)


def theirs(work: Lengths, *, log: bool = False) -> list[float]:
    from trl import RewardTrainer

    pairs, _, anchors = pairs_of(work)
    rows = [{"chosen_ids": [*p.prompt, *p.chosen], "rejected_ids": [*p.prompt, *p.rejected]} for p in pairs]
    return _run(RewardTrainer, rows, len(pairs) // len(set(anchors)) * ANCHORS, log)


def _run(kind: Any, rows: list[dict[str, Any]], batch: int, log: bool) -> list[float]:
    from datasets import Dataset
    from trl import RewardConfig

    trained = model()
    optimizer = adamw(trained, RATE)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        trainer = kind(
            trained,
            RewardConfig(**options(folder, batch, log)),
            train_dataset=Dataset.from_list(rows),
            processing_class=byte_tokenizer(),
            optimizers=(optimizer, get_scheduler("linear", optimizer, 0, STEPS)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def contenders(work: str) -> dict[str, Callable[..., list[float]]]:
    lengths = WORKS[work]
    return {
        OURS: functools.partial(ours, lengths, True),
        APART: functools.partial(ours, lengths, False),
        TRL: functools.partial(theirs, lengths),
    }


def rows() -> list[Row]:
    found = []
    for work, lengths in WORKS.items():
        runs = contenders(work)
        losses = {name: torch.tensor(run(log=True)) for name, run in runs.items()}
        torch.testing.assert_close(losses[OURS], losses[APART], rtol=1e-4, atol=1e-4)
        if not lengths.ties:
            torch.testing.assert_close(losses[OURS], losses[TRL], rtol=1e-4, atol=1e-4)
        pairs, labels, anchors = pairs_of(lengths)
        groups = group_pairs(pairs, labels, anchors=anchors)
        sequences = [sequence for group in groups for sequence in group["sequences"]]
        tokens = sum(map(len, sequences))
        size = sum(parameter.numel() for parameter in model().parameters())
        per_token = flops_per_token(model(), tokens // len(sequences))
        result = compare(
            runs,
            work=f"{work}: {STEPS} steps, {len(groups)} anchors, {len(pairs)} pairs, {len(sequences)} sequences instead of "
            f"{2 * len(pairs)}, {tokens:,} tokens, {size / 1e6:.1f}M parameters, fp32",
            repeats=REPEATS,
            limit=Limit(flops=3 * per_token * tokens, bytes=STEPS * 4 * size * 11),
        )
        memory = {name: peak_memory("benchmarks.reward", work, name) for name in runs}
        for peer in (TRL, APART):
            row = result.row(OURS, peer, at_most=(0.4 if lengths.ties else 0.5) if peer == TRL else None)
            speed = {name: f"; {len(pairs) / result.median(name):,.1f} pairs/s, {memory[name]:.0f} MB" for name in runs}
            found.append(
                dataclasses.replace(row, measured=row.measured + speed[OURS], against=row.against + speed[peer])
            )
    return found


def measured(work: str, name: str) -> Callable[..., list[float]]:
    """A training run, for its peak memory; what is imported and built once is no part of it."""
    import trl

    assert trl
    run = contenders(work)[name]
    model()
    return run
