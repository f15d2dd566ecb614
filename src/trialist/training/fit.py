"""The training loop: exact budgets, identical randomness over arms, resume to the bit."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trialist.training.checkpoints import load_checkpoint, load_optimizer_state, save_checkpoint, writable_folder
from trialist.training.hooks import Hooks, Progress, Report
from trialist.training.measures import (
    batch_cost,
    describe,
    describe_model,
    describe_optimizer,
    digest_batch,
    flops_counter,
)
from trialist.training.schedules import Schedule, build_schedule

Batch = Mapping[str, Tensor]
Batches = Callable[[int], Batch]
Objective = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, Any]]]

UNITS = ("steps", "tokens", "flops", "seconds")
LOOK_EVERY = 10  # steps between two looks at an accelerator's numbers: each one makes the host wait
CURVE_POINTS = 100


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
    checkpoint: a folder. When it holds a checkpoint, training goes on from there bit for bit; one of other settings or
        other data is refused. Written every `checkpoint_every` steps and after the last one; the newest `keep` stay.
    callbacks: `transformers.TrainerCallback`s.
    seed: of dropout and whatever else model and objective draw from torch; drawn anew for each step from (seed, step).
    progress: a bar where stdout is a terminal; or a callable that is told (done, total, numbers), as
        `Context.progress` is.
    flops_per_token: forward FLOPs per input position, or a function of the length T; None counts from the model's
        modules.
    divergence_margin: training has diverged if its loss ends above its start by more than this share (end: mean of the
        last ten steps; start: the first step or the median of the first ten, whichever is higher); `math.inf` switches
        that off.

    A loss or gradient that is not finite ends training and is reported in `FitResult.diverged` with its step: on the
    CPU before it reaches the weights, on an accelerator up to ten steps later.
    Raises ValueError for arguments that cannot work, OSError when the checkpoint folder cannot be written.
    """
    unit, amount = _single_budget(budget)
    _check_counts(accumulate=accumulate, keep=keep, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, or None for no clipping; not {clip}")
    first = batches(0)
    batch_cost(first, None)
    run = _Run(
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
    )
    if unit == "flops" and run.flops is None:
        raise ValueError("budget: the FLOPs of this model cannot be counted; give flops_per_token")

    def budget_steps() -> int:
        if unit == "seconds":
            raise ValueError("schedule: a budget in seconds has no known number of steps; set Schedule(steps=...)")
        return math.ceil(amount if unit == "steps" else amount / run.step_cost(1)[unit])

    run.scheduler, about_schedule = build_schedule(schedule, optimizer, budget_steps)
    settings: dict[str, Any] = {}
    resumed_at = 0
    if checkpoint is not None:
        writable_folder(checkpoint)
        settings = run.settings(first, about_schedule) | {"compile": compile}
        found = load_checkpoint(checkpoint, settings)
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
        "logging_steps": LOOK_EVERY,
        "seed": seed,
        "report_to": "none",
        "use_cpu": run.device.type == "cpu",
    }
    hooks = Hooks(callbacks, model, optimizer, run.scheduler, arguments)
    shown = Progress(progress, unit, amount)
    diverged: str | None = None
    try:
        with _training_mode(model, run.device), _compiled(run, first, compile):
            hooks.at(run.step, run.spent)
            hooks("on_train_begin")
            while run.spent[unit] < amount and not hooks.wants("should_training_stop"):
                began = time.perf_counter()
                hooks("on_step_begin")
                run.accumulate_gradients(hooks)
                on_time = run.device.type == "cpu" or run.step % LOOK_EVERY == 0
                if on_time and (diverged := run.look()):
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

                last = run.spent[unit] >= amount or hooks.wants("should_training_stop")
                evaluates = evaluate is not None and (last or _due(run.step, evaluate_every))
                saves = checkpoint is not None and (last or _due(run.step, checkpoint_every))
                evaluates |= hooks.wants("should_evaluate") and evaluate is not None
                saves |= hooks.wants("should_save") and checkpoint is not None
                if (evaluates or saves or last) and (diverged := run.look()):
                    break
                shown(run.spent[unit], run.logs, force=last)
                if hooks.wants("should_log") or last or run.step % LOOK_EVERY == 0:
                    hooks("on_log", logs=dict(run.logs))
                if evaluates:
                    assert evaluate is not None
                    hooks("on_evaluate", metrics=run.evaluate(evaluate))
                if saves:
                    assert checkpoint is not None
                    save_checkpoint(checkpoint, run.step, run.state(), settings, keep=keep)
                    hooks("on_save")
            hooks("on_train_end")
    finally:
        shown.close()
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


@dataclass
class _Run:
    """The state of a training run and the moves that change it."""

    model: nn.Module
    batches: Batches
    objective: Objective
    optimizer: Optimizer
    parameters: list[nn.Parameter]
    unit: str
    accumulate: int
    clip: float | None
    autocast: torch.dtype | None
    seed: int
    flops: Callable[[int], float] | None
    scheduler: LRScheduler | None = None
    step: int = 0
    """Steps begun; all of them finished except while `accumulate_gradients` runs or after a divergence"""
    spent: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    history: list[tuple[float, float, float]] = field(default_factory=list)
    """Per step: loss per unit of weight, weight, budget spent"""
    pending: list[tuple[int, Tensor]] = field(default_factory=list)
    """Steps whose (loss sum, weight, gradient norm) the host has not looked at yet"""
    logs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spent = {unit: 0.0 for unit in UNITS if unit != "flops" or self.flops is not None}

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def micro_batches(self, step: int) -> range:
        return range((step - 1) * self.accumulate, step * self.accumulate)

    def step_cost(self, step: int) -> dict[str, float]:
        costs = [batch_cost(self.batches(index), self.flops) for index in self.micro_batches(step)]
        return {unit: sum(cost[unit] for cost in costs) for unit in costs[0]}

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """Sum of the losses, attached to the graph, and its weight."""
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        context: AbstractContextManager = (
            nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        )
        with context:
            loss, stats = self.objective(self.model, moved)
        if loss.dim() != 0 or not loss.requires_grad:
            raise ValueError(
                f"objective {describe(self.objective)} must return a scalar sum that depends on a trained parameter; it "
                f"returned shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
            )
        if "weight" not in stats:
            raise ValueError(
                f"objective {describe(self.objective)} must return stats['weight'], the denominator of its sum; it returned "
                f"{', '.join(map(repr, stats)) or 'no stats'}"
            )
        return loss, stats["weight"]

    def accumulate_gradients(self, hooks: Hooks) -> None:
        """Leaves the clipped gradient of the next step in the parameters and its numbers in `pending`."""
        self.step += 1
        torch.manual_seed(stream_seed(self.seed, "step", self.step))
        total = torch.zeros((), device=self.device)
        weight: Tensor | float = 0.0
        for index in self.micro_batches(self.step):
            batch = self.batches(index)
            loss, micro_weight = self.loss(batch)
            loss.backward()
            total += loss.detach()
            weight = weight + micro_weight
            for unit, cost in batch_cost(batch, self.flops).items():
                self.spent[unit] += cost
            if index + 1 < self.step * self.accumulate:
                hooks("on_substep_end")
        weight = torch.as_tensor(weight, dtype=torch.float32, device=self.device)
        norm = scale_gradients(self.parameters, weight, self.clip)
        self.spent["steps"] = float(self.step)
        self.pending.append((self.step, torch.stack((total, weight, norm))))
        self.history.append((math.nan, math.nan, self.spent[self.unit]))

    def look(self) -> str | None:
        """Brings the pending numbers to the host. The first that is not finite is a divergence: its name and step."""
        diverged = None
        rows = torch.stack([numbers for _, numbers in self.pending]).tolist() if self.pending else []
        for (step, _), (total, weight, norm) in zip(self.pending, rows, strict=True):
            if weight == 0:
                raise ValueError(f"step {step} has weight 0: no token of its batch counts; check labels and masks")
            loss = total / weight
            self.history[step - 1] = (loss, weight, self.history[step - 1][2])
            self.logs = {"loss": loss, "grad_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if diverged is None and not math.isfinite(value):
                    diverged = f"{name} is {value} at step {step}"
        self.pending.clear()
        return diverged

    def count_seconds(self, began: float) -> None:
        if self.device.type == "cuda" and (self.unit == "seconds" or self.step % LOOK_EVERY == 0):
            torch.cuda.synchronize(self.device)
        self.spent["seconds"] += time.perf_counter() - began
        loss, weight, _ = self.history[-1]
        self.history[-1] = (loss, weight, self.spent[self.unit])

    def evaluate(self, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
        """One point more on the curves. Every evaluation of every arm draws the same random numbers."""
        torch.manual_seed(stream_seed(self.seed, "evaluation", 0))
        self.model.eval()
        with torch.no_grad():
            metrics = {name: float(value) for name, value in evaluate(self.model).items()}
        self.model.train()
        if "train_loss" in metrics:
            raise ValueError("evaluate: the name 'train_loss' is taken by the curve of the training loss")
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append((self.spent[self.unit], value))
        return metrics

    def training_curve(self) -> list[tuple[float, float]]:
        """The loss over spans of equal numbers of steps, weighted as in training; at most `CURVE_POINTS` points."""
        width = max(1, math.ceil(len(self.history) / CURVE_POINTS))
        points = []
        for start in range(0, len(self.history), width):
            span = [row for row in self.history[start : start + width] if math.isfinite(row[0])]
            if span:
                mean = sum(loss * weight for loss, weight, _ in span) / sum(weight for _, weight, _ in span)
                points.append((span[-1][2], mean))
        return points

    def settings(self, first: Batch, schedule: Mapping[str, Any]) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        return {
            "model": describe_model(self.model),
            "data": digest_batch(first),
            "objective": describe(self.objective),
            "optimizer": describe_optimizer(self.optimizer),
            "schedule": schedule,
            "budget_unit": self.unit,
            "accumulate": self.accumulate,
            "clip": self.clip,
            "autocast": None if self.autocast is None else str(self.autocast),
            "seed": self.seed,
        }

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.scheduler is None else self.scheduler.state_dict(),
            "step": self.step,
            "spent": self.spent,
            "curves": self.curves,
            "history": torch.tensor(self.history, dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule"])
        self.step, self.spent, self.curves = state["step"], state["spent"], state["curves"]
        self.history = [(loss, weight, spent) for loss, weight, spent in state["history"].tolist()]


def stream_seed(seed: int, name: str, index: int) -> int:
    """A seed in [0, 2**63) for one use of randomness: a function of its arguments, independent of what ran before."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=8).digest(), "little") >> 1


def scale_gradients(parameters: Sequence[nn.Parameter], weight: Tensor, clip: float | None) -> Tensor:
    """Turns gradients of a sum into those of the mean and clips them, in one pass; returns their norm before clipping.

    The clipping is that of `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).float() / weight
    factor = 1 / weight if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0) / weight
    torch._foreach_mul_(gradients, factor)
    return norm


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
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)


@contextmanager
def _compiled(run: _Run, batch: Batch, compile: bool) -> Iterator[None]:
    """The backbone compiled in place while the block lasts; a warm-up pass keeps compilation out of the seconds."""
    if not compile:
        yield
        return
    inner = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model  # a PEFT wrapper
    backbone = getattr(inner, "base_model", inner)
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    run.loss(batch)  # what model or objective do at their first call stays out of the compiled code
    backbone.compile()
    try:
        run.loss(batch)[0].backward()
        run.model.zero_grad(set_to_none=True)
        for name, buffer in run.model.named_buffers():
            buffer.copy_(buffers[name])
        yield
    finally:
        backbone._compiled_call_impl = None


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
        raise ValueError("optimizer: it must hold trainable parameters of this model and no others")
    return trained
