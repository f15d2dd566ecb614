"""The state of a training run, one step of it, and its form in a checkpoint."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trialist.training.checkpoints import load_optimizer_state
from trialist.training.hooks import Hooks
from trialist.training.measures import batch_cost, describe, describe_model, describe_optimizer, digest_batch
from trialist.training.parallel import ALONE, Ranks, local_part

Batch = Mapping[str, Tensor]
Batches = Callable[[int], Batch]
Objective = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, Any]]]

UNITS = ("steps", "tokens", "flops", "seconds")
LOG_EVERY = 10
CURVE_POINTS = 100


@dataclass
class TrainingState:
    """Model, optimizer, position and what was spent, with the moves that change them."""

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
    ranks: Ranks = ALONE
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

    def draw_from(self, name: str, index: int) -> None:
        """Seeds the generators that model and objective draw from: those of the CPU and of the model's device."""
        seed = stream_seed(self.seed, name, index)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also records a traceback for absent accelerators
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

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
            loss, stats = self.ranks.run(self.model, self.objective, moved)
        if loss.dim() != 0 or not loss.requires_grad:
            raise ValueError(
                f"objective {describe(self.objective)} must return a scalar sum that depends on a trained parameter; "
                f"it returned shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
            )
        if "weight" not in stats:
            raise ValueError(
                f"objective {describe(self.objective)} must return stats['weight'], the denominator of its sum; "
                f"it returned {', '.join(map(repr, stats)) or 'no stats'}"
            )
        return loss, stats["weight"]

    def accumulate_gradients(self, hooks: Hooks) -> None:
        """Leaves the clipped gradient of the next step in the parameters and its numbers in `pending`."""
        self.step += 1
        self.draw_from("step", self.step)
        total = torch.zeros((), device=self.device)
        weight: Tensor | float = 0.0
        costs = []
        for turn, (index, counts) in enumerate(self.ranks.share(self.micro_batches(self.step))):
            if turn:
                hooks("on_substep_end")
            if self.ranks.kind is not None:
                self.draw_from("micro-batch", index)  # the same numbers whichever rank computes it
            batch = self.batches(index)
            loss, micro_weight = self.loss(batch)
            if not counts:
                (loss * 0).backward()
                continue
            loss.backward()
            total += loss.detach()
            weight = weight + micro_weight
            costs.append(batch_cost(batch, self.flops))
        self.refuse_sparse_gradients()
        weight = torch.as_tensor(weight, dtype=torch.float32, device=self.device)
        if self.ranks.kind is not None:
            own = {unit: sum(cost[unit] for cost in costs) for unit in self.spent if unit in ("tokens", "flops")}
            sums, everywhere = self.ranks.add_up(
                self.model, self.parameters, torch.stack((total.double(), weight.double())), own
            )
            (total, weight), costs = sums.float(), [everywhere]
        for cost in costs:
            for unit, amount in cost.items():
                self.spent[unit] += amount
        norm = scale_gradients(self.parameters, weight, self.clip, self.ranks)
        self.spent["steps"] = float(self.step)
        self.pending.append((self.step, torch.stack((total, weight, norm))))
        self.history.append((math.nan, math.nan, self.spent[self.unit]))

    def refuse_sparse_gradients(self) -> None:
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in self.parameters):
            name = next(n for n, p in self.model.named_parameters() if p.grad is not None and p.grad.is_sparse)
            raise ValueError(
                f"the gradient of {name} is sparse, and fit takes dense ones (it adds them up over micro-batches and ranks and "
                "clips their norm): build the layer with sparse_grad=False (torch.nn.Embedding: sparse=False), or train it in "
                "a loop of your own"
            )

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
        if self.device.type == "cuda" and (self.unit == "seconds" or self.step % LOG_EVERY == 0):
            torch.cuda.synchronize(self.device)
        elapsed = time.perf_counter() - began
        if self.unit == "seconds":
            elapsed = self.ranks.number_of_first(elapsed)  # one clock decides on which step is the last
        self.spent["seconds"] += elapsed
        loss, weight, _ = self.history[-1]
        self.history[-1] = (loss, weight, self.spent[self.unit])

    def evaluate(self, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
        """One point more on the curves. Every evaluation of every arm draws the same random numbers."""
        self.draw_from("evaluation", 0)
        self.model.eval()
        with torch.no_grad():
            metrics = {name: float(value) for name, value in self.ranks.run(self.model, evaluate).items()}
        self.ranks.reshard()
        self.model.train()
        metrics = self.ranks.gather(metrics)[0]
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
            **({} if self.ranks.kind is None else {"parallel": self.ranks.described}),
        }

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(keep_vars=self.ranks.kind == "fsdp"),  # tied shards known by identity
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


def scale_gradients(
    parameters: Sequence[nn.Parameter], weight: Tensor, clip: float | None, ranks: Ranks = ALONE
) -> Tensor:
    """Turns gradients of a sum into those of the mean and clips them, in one pass; returns their norm before clipping.

    The clipping is that of `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = ranks.total_norm(gradients, weight.device).float() / weight
    factor = 1 / weight if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0) / weight
    torch._foreach_mul_(gradients, factor)
    return norm


@contextmanager
def compiled(state: TrainingState, batch: Batch, compile: bool) -> Iterator[None]:
    """The backbone compiled in place while the block lasts; a warm-up pass keeps compilation out of the seconds."""
    if not compile:
        yield
        return
    inner = state.model.get_base_model() if hasattr(state.model, "get_base_model") else state.model  # a PEFT wrapper
    backbone = getattr(inner, "base_model", inner)
    buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
    state.loss(batch)  # what model or objective do at their first call stays out of the compiled code
    backbone.compile()
    try:
        state.loss(batch)[0].backward()
        state.model.zero_grad(set_to_none=True)
        for name, buffer in state.model.named_buffers():
            buffer.copy_(buffers[name])
        yield
    finally:
        backbone._compiled_call_impl = None
