"""The training loop: exact budgets, identical randomness over arms, resume to the bit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trialist.training.checkpoints import load_checkpoint, save_checkpoint, writable_folder
from trialist.training.hooks import SWITCHES, Hooks, Progress, Report
from trialist.training.measures import batch_cost, flops_counter
from trialist.training.parallel import Ranks
from trialist.training.schedules import Schedule, build_schedule
from trialist.training.state import LOG_EVERY, UNITS, Batches, Objective, TrainingState, compiled


@dataclass(frozen=True)
class FitResult:
    """What a training run cost and how it went."""

    cost: dict[str, float]
    """`steps`, `tokens`, `seconds` and, where they can be counted, `flops`: what was spent, as measured"""
    curves: dict[str, list[tuple[float, float]]]
    """Name -> points (spent in the unit of the budget, value): what `evaluate` returned, and `train_loss`"""
    diverged: str | None
    """Why and at which step training diverged"""
    steps: int
    loss: float
    """Loss of the last step per unit of weight; nan before the first step"""
    losses: tuple[float, ...] = field(default=(), repr=False)
    """Loss of every step per unit of weight, those before a resume included"""
    resumed_at: int = 0
    """Step of the checkpoint that this call went on from"""


def fit(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    optimizer: Optimizer,
    schedule: Schedule | str | LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    budget: Mapping[str, float] = MappingProxyType({"steps": 400}),
    *,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    accumulate: int = 1,
    clip: float | None = 1.0,
    autocast: str | torch.dtype | None = None,
    compile: bool = False,
    parallel: str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    callbacks: Sequence[Any] = (),
    seed: int = 0,
    progress: bool | Report = True,
    flops_per_token: float | Callable[[int], float] | None = None,
    divergence_margin: float = 0.1,
) -> FitResult:
    """Trains `model` in place until the budget is spent.

    batches: a pure function of the index of a micro-batch (step s takes `accumulate` of them from (s-1) * accumulate
        on); it returns a dict of tensors with `input_ids` (B, T), on any device.
    objective: returns a loss that is a sum, and stats with its denominator `weight`. Gradients of the sums are added
        up over the micro-batches and divided by their total weight: every token weighs the same however it is batched.
    schedule: a `Schedule`, its name, a torch scheduler or a function that makes one; stepped once per optimizer step.
    budget: an amount of one unit: `steps`, `tokens` (input positions that are not padding), `flops` or `seconds`
        (training alone, without evaluation, checkpoints and compilation). The step that reaches the amount is the last
        one.
    evaluate: called every `evaluate_every` steps and after the last one, in evaluation mode, without gradients.
    clip: largest norm of the gradient. autocast: `bfloat16` or None. compile: compiles the backbone for this call.
    parallel: "ddp" (every process holds the weights) or "fsdp" (after `shard_model`), in each of the processes that
        torchrun started. They take turns at the micro-batches of a step, of which there must be at least as many, and
        train as one process does with the same arguments; budget and cost count all of them. `evaluate` is called in
        each and must take the model through the same passes there; what it returns on rank 0 counts.
    checkpoint: a folder. When it holds a checkpoint, training goes on from there bit for bit; one of other settings or
        other data is refused. Written every `checkpoint_every` steps and after the last one; the newest `keep` stay.
    callbacks: `transformers.TrainerCallback`s.
    seed: of dropout and whatever else model and objective draw from torch; drawn anew for each step from (seed, step),
        with `parallel` for each micro-batch from (seed, its index).
    progress: a bar where stdout is a terminal; or a callable that is told (done, total, numbers), as
        `Context.progress` is.
    flops_per_token: forward FLOPs per input position, or a function of the length T; None counts from the model's
        modules.
    divergence_margin: training has diverged if its loss ends above its start by more than this share (end: mean of the
        last ten steps; start: the first step or the median of the first ten, whichever is higher); `math.inf` switches
        that off.

    A loss or gradient that is not finite ends training and is reported in `FitResult.diverged` with its step: on the
    CPU before it reaches the weights, on an accelerator up to ten steps later.
    Raises ValueError for arguments that cannot work and for sparse gradients, OSError when the checkpoint folder cannot be
    written.
    """
    unit, amount = _single_budget(budget)
    _check_counts(accumulate=accumulate, keep=keep, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, or None for no clipping; not {clip}")
    ranks = Ranks(parallel, model)
    if accumulate < ranks.size:
        raise ValueError(
            f"accumulate is {accumulate}: that many micro-batches of a step cannot be shared by {ranks.size} ranks; give "
            f"accumulate={ranks.size} or a multiple of it, with smaller batches"
        )
    together = [name for name, module in model.named_modules() if _normalises_over_ranks(module)]
    if together and accumulate % ranks.size:
        raise ValueError(
            f"accumulate is {accumulate}, and {together[0]} normalises over the batches of all {ranks.size} ranks, so none may "
            f"be left without one: give a multiple of {ranks.size}"
        )
    if compile and parallel == "fsdp":
        raise ValueError("compile does not go with parallel='fsdp'; compile the layers before shard_model instead")
    first = batches(0)
    batch_cost(first, None)
    run = TrainingState(
        model=model,
        batches=batches,
        objective=objective,
        optimizer=optimizer,
        parameters=_trained_parameters(model, optimizer),
        unit=unit,
        accumulate=accumulate,
        clip=clip,
        autocast=_autocast_dtype(autocast),
        seed=seed,
        flops=flops_counter(model, flops_per_token, first["input_ids"].shape[-1]),
        ranks=ranks,
    )
    if unit == "flops" and run.flops is None:
        raise ValueError("budget: the FLOPs of this model cannot be counted; give flops_per_token")

    def budget_steps() -> int:
        if unit == "seconds":
            raise ValueError("schedule: a budget in seconds has no known number of steps; set Schedule(steps=...)")
        return math.ceil(amount if unit == "steps" else amount / run.step_cost(1)[unit])

    run.scheduler, about_schedule = build_schedule(schedule, optimizer, budget_steps)
    settings: dict[str, Any] = {}
    if checkpoint is not None or parallel is not None:
        settings = run.settings(first, about_schedule) | {"compile": compile}
    if parallel is not None:
        rhythm = {
            "evaluate": evaluate is not None,
            "evaluate_every": evaluate_every,
            "checkpoint_every": checkpoint_every,
        }
        ranks.require_same(settings | rhythm | {"budget": amount, "checkpoint": checkpoint and str(checkpoint)})
        ranks.start_alike(model)
    resumed_at = 0
    if checkpoint is not None:
        with ranks.together():
            writable_folder(checkpoint)
        found = load_checkpoint(checkpoint, settings, ranks=ranks)
        if found is not None:
            resumed_at, state = found
            if unit == "steps" and resumed_at > amount:
                raise ValueError(
                    f"checkpoint folder {checkpoint} is at step {resumed_at}, beyond the budget of {amount:g} steps; "
                    "raise the budget or give another folder"
                )
            run.restore(state)
    arguments = {
        "output_dir": str(checkpoint or "."),
        "max_steps": math.ceil(amount) if unit == "steps" else -1,
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": clip or 0.0,
        "eval_steps": evaluate_every,
        "save_steps": checkpoint_every or 500,
        "logging_steps": LOG_EVERY,
        "seed": seed,
        "report_to": "none",
        "use_cpu": run.device.type == "cpu",
    }
    hooks = Hooks(callbacks, model, optimizer, run.scheduler, arguments, ranks)
    shown = Progress(progress if ranks.first else False, unit, amount)
    diverged: str | None = None
    try:
        with _training_mode(model, run.device), compiled(run, first, compile):
            hooks.at(run.step, run.spent)
            hooks("on_train_begin")
            stop = ranks.any(hooks.wants("should_training_stop"))[0]
            while run.spent[unit] < amount and not stop:
                began = time.perf_counter()
                hooks("on_step_begin")
                run.accumulate_gradients(hooks)
                if run.step % _look_every(run.device) == 0 and (diverged := run.look()):
                    break
                hooks("on_pre_optimizer_step")
                optimizer.step()
                if run.scheduler is not None:
                    run.scheduler.step()
                hooks("on_optimizer_step")
                model.zero_grad(set_to_none=True)
                run.count_seconds(began)
                hooks.at(run.step, run.spent)
                hooks("on_step_end", logs=run.logs)

                stop, evaluates, saves, logs = ranks.any(*(hooks.wants(switch) for switch in SWITCHES))
                last = run.spent[unit] >= amount or stop
                evaluates = evaluate is not None and (last or evaluates or _due(run.step, evaluate_every))
                saves = checkpoint is not None and (last or saves or _due(run.step, checkpoint_every))
                logs |= last or run.step % LOG_EVERY == 0
                if (evaluates or saves or last) and (diverged := run.look()):
                    break
                shown(run.spent[unit], run.logs, force=last)
                if logs:
                    hooks("on_log", logs=dict(run.logs))
                if evaluates:
                    assert evaluate is not None
                    hooks("on_evaluate", metrics=run.evaluate(evaluate))
                if saves:
                    assert checkpoint is not None
                    save_checkpoint(checkpoint, run.step, run.state(), settings, keep=keep, ranks=ranks)
                    hooks("on_save")
                if evaluates or saves or logs:
                    stop = ranks.any(hooks.wants("should_training_stop"))[0]
            hooks("on_train_end")
    finally:
        shown.close()
    run.spent["seconds"] = ranks.number_of_first(run.spent["seconds"])
    losses = tuple(loss for loss, _, _ in run.history)
    return FitResult(
        cost=dict(run.spent),
        curves={**run.curves, "train_loss": run.training_curve()},
        diverged=diverged or rise(losses, divergence_margin),
        steps=run.step,
        loss=losses[-1] if losses else math.nan,
        losses=losses,
        resumed_at=resumed_at,
    )


def rise(losses: Sequence[float], margin: float) -> str | None:
    """Says so when the losses end above their start by more than `margin` of it, and by more than 0.01."""
    window = min(10, len(losses) // 2)
    if window == 0:
        return None
    start = max(losses[0], statistics.median(losses[:window]))
    end = statistics.fmean(losses[-window:])
    if end - start > max(margin * abs(start), 0.01):
        return f"loss {end:.4g} at step {len(losses)} is above its start of {start:.4g}"
    return None


@contextmanager
def _training_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode inside; the caller's mode and random state afterwards."""
    was_training = model.training
    accelerator: dict[str, Any] = {"devices": []}
    if device.type != "cpu":
        accelerator = {"devices": [device], "device_type": device.type}
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(**accelerator):
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)


def _single_budget(budget: Mapping[str, float]) -> tuple[str, float]:
    if len(budget) != 1:
        raise ValueError(f"budget names one unit and an amount, e.g. {{'steps': 400}}; not {dict(budget)}")
    ((unit, amount),) = budget.items()
    if unit not in UNITS:
        raise ValueError(f"budget unit {unit!r} is unknown; one of {', '.join(UNITS)}")
    if not 0 < amount < math.inf:
        raise ValueError(f"budget: {unit} must be a finite number > 0, not {amount}")
    return unit, float(amount)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def _normalises_over_ranks(module: nn.Module) -> bool:
    """As `QuerySyncBatchNorm` of PEER and torch's own do, in training mode."""
    return isinstance(module, nn.SyncBatchNorm) or getattr(module, "across_ranks", False)


def _look_every(device: torch.device) -> int:
    """Steps between two looks at the numbers on a device: on an accelerator each look makes the host wait."""
    return 1 if device.type == "cpu" else LOG_EVERY


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _autocast_dtype(autocast: str | torch.dtype | None) -> torch.dtype | None:
    if autocast is None:
        return None
    if autocast in ("bfloat16", torch.bfloat16):
        return torch.bfloat16
    raise ValueError(f"autocast must be 'bfloat16' or None, not {autocast!r}; float16 would need loss scaling")


def _trained_parameters(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    own = {id(parameter) for parameter in model.parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not trained or any(id(parameter) not in own for parameter in trained):
        raise ValueError(
            "optimizer: it must hold trainable parameters of this model and no others"
            + ("; make it after shard_model" if hasattr(model, "_root_of_shards") else "")
        )
    return trained
