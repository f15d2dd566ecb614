"""How a cell of the learning-rate and batch study is made: the model before, its fine-tuning, and what it then answers."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, given_model, new_decoder, save, train
from trialist.trials._lr_batch_grid import Point
from trialist.trials._lr_batch_tasks import symbols_of, task_rows

if TYPE_CHECKING:
    from trialist.trials.lr_batch_ratio import LearningRateBatchTrial

WARMUP = 0.03
"""Share of the steps over which the learning rate rises, as in the recipe for fine-tuning"""
TEXT_ROWS = 64
"""Rows in a step of mixed text"""
LOGITS = 2**26
"""Most logits at a time"""


def build_base(trial: LearningRateBatchTrial, context: Context, folder: Path) -> None:
    """Mixed text for a fresh decoder. Raises ValueError where that diverges."""
    from trialist.data.instruction_tasks import MixedText

    symbols = symbols_of(trial, context.stream("tasks"))
    model = new_decoder(
        context, device=trial.device, hidden_size=trial.width, vocab_size=symbols.size, num_hidden_layers=trial.layers,
        num_attention_heads=trial.heads, head_dim=trial.width // trial.heads,
        layer_types=["full_attention"] * trial.layers, max_position_embeddings=symbols.longest,
    )  # fmt: skip
    text = MixedText(symbols, TEXT_ROWS, symbols.longest)
    here = dataclasses.replace(context, folder=folder, keep_model=False)
    outcome, _ = train(
        model.train(), lambda step: {name: ids.to(model.device) for name, ids in text(step).items()}, here,
        steps=trial.pretraining, learning_rate=trial.pretraining_rate, dtype=trial.dtype, evaluate=lambda _: {},
        evaluations=1,
    )  # fmt: skip
    if outcome.diverged is not None:
        raise ValueError(f"the base has diverged ({outcome.diverged}); lower --pretraining-rate")
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    save(model, None, folder / "model")


def build_cell(
    trial: LearningRateBatchTrial, context: Context, base: Path | None, task: str, point: Point, folder: Path
) -> None:
    """Fine-tunes the base, or the given model, at a place of the grid; `cell.json` says what came of it."""
    from trialist.models.loading import load_model

    if base is None:
        model = given_model(context, trial.model, device=trial.device, lora=trial.lora)
    else:
        model = load_model(str(base / "model"), device=resolve_device(trial.device))
    found: dict[str, Any] = {"cost": {"steps": 0, "tokens": 0}, "diverged": None, "lr_time": 0.0, "metrics": {}}
    if point.steps:
        found |= tuned(trial, dataclasses.replace(context, folder=folder), model, task, point)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    elif context.keep_model:
        save(model, tokenizer_of(trial), context.model_folder)
    if found["diverged"] is None:
        model.eval()
        test, validation = (answered(model, rows) for rows in task_rows(trial, context, task, ("test", "validation")))
        found["metrics"] = {**test, "validation_score": validation["score"]}
    (folder / "cell.json").write_text(json.dumps(found))


def tuned(trial: LearningRateBatchTrial, context: Context, model: Any, task: str, point: Point) -> dict[str, Any]:
    """Fine-tunes the model in place: cost, whether it diverged, and the learning rates of all steps added up."""
    from trialist.data.collation import stack_or_pad
    from trialist.data.order import BatchOrder
    from trialist.optimizers import adamw
    from trialist.training import Schedule

    (rows,) = task_rows(trial, context, task, ("train",))
    order = BatchOrder(len(rows), point.batch, context.stream("data_order"))

    def batches(step: int) -> dict[str, Any]:
        batch = stack_or_pad([rows[index] for index in order(step)])
        return {name: tensor.to(model.device) for name, tensor in batch.items()}

    # without weight decay, which would act through learning-rate time, the very thing that is controlled for
    optimizer = adamw(model, point.learning_rate, weight_decay=0.0, betas=(0.9, 0.999))
    spent: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: spent.append(opt.param_groups[0]["lr"]))
    outcome, _ = train(
        model.train(), batches, context, steps=point.steps, learning_rate=point.learning_rate, dtype=trial.dtype,
        evaluate=lambda _: {}, evaluations=1, tokenizer=tokenizer_of(trial), optimizer=optimizer,
        schedule=Schedule("linear", warmup=math.ceil(WARMUP * point.steps)),
    )  # fmt: skip
    # a run that diverged before its first step has spent nothing, and a logarithm needs something
    lr_time = math.fsum(spent) or point.learning_rate
    return {"cost": outcome.cost.as_dict(), "diverged": outcome.diverged, "lr_time": lr_time}


def tokenizer_of(trial: LearningRateBatchTrial) -> Any:
    """That of a given model; generated symbols have none."""
    from trialist.data.tokenizers import load_tokenizer

    return None if trial.model == BUILT_IN else load_tokenizer(trial.model)


def answered(model: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a model makes of right answers.

    `score`: the geometric mean of the probabilities of their tokens, each after the right ones before it. `greedy`: the share of
    answers of which every token is the most probable one, which is what greedy generation gets right. `sampled`: the
    mean probability of a whole answer, which is what sampling gets right on average.
    """
    import torch

    from trialist.data.collation import stack_or_pad
    from trialist.data.packing import IGNORED

    longest = max(len(row["input_ids"]) for row in rows)
    at_once = max(1, min(256, LOGITS // (longest * model.config.vocab_size)))
    nats, tokens = 0.0, 0
    right: list[Any] = []
    chance: list[Any] = []
    with torch.no_grad():
        for start in range(0, len(rows), at_once):
            batch = stack_or_pad(rows[start : start + at_once])
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
            labels = batch["labels"][:, 1:].to(model.device)
            counted = labels != IGNORED  # (B, T - 1)
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()  # (B, T - 1, V)
            picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).double()
            picked = picked.where(counted, 0.0)
            nats, tokens = nats - float(picked.sum()), tokens + int(counted.sum())
            right.append(((logits.argmax(-1) == labels) | ~counted).all(1))
            chance.append(picked.sum(1).exp())
    return {
        "score": math.exp(-nats / tokens),
        "greedy": float(torch.cat(right).double().mean()),
        "sampled": float(torch.cat(chance).mean()),
    }
