"""Any objective inside the Hugging Face Trainer: token weighting exact over micro-batches and ranks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length

from trialist.data.collation import stack_or_pad
from trialist.optimizers.adamw import declared_groups
from trialist.training.measures import describe
from trialist.training.state import Objective

NO_PREDICTIONS = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")


class ObjectiveTrainer(Trainer):
    """`transformers.Trainer` that trains by an objective: `loss, stats = objective(model, batch)`.

    The loss is a sum and `stats["weight"]` its denominator. The gradient of a step is that of the sum of all losses over
    the sum of all weights, over the micro-batches of the step and all ranks; clipping and the logged norm are of that
    mean. Other entries of `stats` are sums too. `loss`, `eval_loss` and the other stats (`eval_NAME`) are logged per unit
    of weight: in training the mean over the steps since the last log, in evaluation exactly over the data, on however
    many ranks. Not-a-number losses are logged as such.

    All columns of the data reach the objective. The default collator stacks rows of equal length (packed rows with
    `position_ids`) and pads others on the right. An objective may have a method `weight(batch)` that tells its
    denominator without a forward pass; DeepSpeed, which steps within the backward pass, needs it.
    Everything else is the Trainer's: arguments, LoRA models, callbacks, loggers, resuming, torchrun; its optimizer gets the
    parameter groups that modules declare, as expert tables with a learning rate of their own.

    Raises ValueError for what an objective has no use for: label smoothing, `compute_metrics`, `compute_loss_func`; and
    in training when a step has weight 0.
    """

    loss_is_scaled_for_ga = True  # a sum: the Trainer must not divide it by the number of micro-batches

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        objective: Objective,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[type[TrainerCallback] | TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        **options: Any,
    ) -> None:
        arguments = copy.copy(args or TrainingArguments(output_dir="tmp_trainer"))
        if arguments.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor: the loss is the objective's; put the smoothing there, or set it to 0"
            )
        given = [name for name in NO_PREDICTIONS if options.get(name) is not None]
        if given:
            raise ValueError(f"{given[0]}: an objective returns no predictions; let it return stats, which are logged")
        arguments.remove_unused_columns = False  # which columns are used, only the objective knows
        arguments.logging_nan_inf_filter = False
        if arguments.n_gpu > 1:
            warnings.warn(
                f"{arguments.n_gpu} GPUs are visible and one is used; start with torchrun for all", stacklevel=2
            )
            arguments._n_gpu = 1
        padding = getattr(processing_class, "pad_token_id", None) or 0
        super().__init__(
            model,
            arguments,
            data_collator=data_collator or partial(stack_or_pad, pad_token_id=padding),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
            **options,
        )
        self.objective = objective
        self.model_accepts_loss_kwargs = True  # as loss_is_scaled_for_ga, for transformers before 5.2x
        self.weigh_ahead = self.is_deepspeed_enabled
        """Divide by the total weight before the backward pass instead of after it"""
        if self.weigh_ahead and not hasattr(objective, "weight"):
            raise ValueError(
                f"objective {describe(objective)} needs a method weight(batch) under DeepSpeed, which steps within the "
                "backward pass; add it, or use DDP or FSDP"
            )
        self._ahead: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # loss, weight, other stats of the step so far, on this rank
        self._logged: Tensor | None = None  # other stats per unit of weight, summed over the steps since the last log
        self._logged_steps = 0
        self._evaluated: list[Tensor] = []
        self._own_batches: int | None = None

    # training

    def create_optimizer(self, *given: Any) -> torch.optim.Optimizer:
        """The Trainer's, with the groups that modules declare by `optimizer_groups()` apart, as `trialist.optimizers.adamw`
        has them; an optimizer that was passed in stays as it is."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(*given)
        if made_here:
            _set_apart(optimizer, declared_groups(given[0] if given else self.model, self.args.learning_rate)[0])
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step; the second value only tells the Trainer that the loss is scaled already."""
        if self.state.global_step >= self.state.max_steps:
            return [], torch.ones((), device=device)  # resumed at the end, where the Trainer would make a step too many
        batches = list(islice(epoch_iterator, num_batches))
        self._sums = None
        if self.weigh_ahead and batches:
            weigh = self.objective.weight  # type: ignore[attr-defined]
            total = torch.stack([torch.as_tensor(weigh(batch), dtype=torch.float32) for batch in batches]).sum()
            self._ahead = self._over_ranks(total.to(device))
        return batches, torch.ones((), device=device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the losses of a micro-batch (under DeepSpeed its share of the mean); with `return_outputs` also
        the stats."""
        loss, stats = self._run(model, inputs)
        row = self._row(loss, stats)
        self._sums = row if self._sums is None else self._sums + row
        if self.weigh_ahead and self._ahead is not None:
            loss = loss * (self.accelerator.num_processes / self._ahead)  # ranks are averaged
        return (loss, stats) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Adds up the gradients of a micro-batch; the last one of a step turns their sum into the mean.

        Returns the loss of the step per unit of weight with its last micro-batch, and 0 before.
        """
        super().training_step(model, inputs, num_items_in_batch)
        assert self._sums is not None
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        totals = self._over_ranks(self._sums)
        weight = totals[1]
        if weight.device.type == "cpu" and weight == 0:
            raise ValueError(
                f"step {self.state.global_step + 1} has weight 0: no token of its batch counts; check labels and masks"
            )
        if not self.weigh_ahead:
            _scale_gradients(model, self.accelerator.num_processes / weight)  # ranks were averaged
        means = totals / weight
        self._logged = means[2:] if self._logged is None else self._logged + means[2:]
        self._logged_steps += 1
        return means[0].to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._logged is not None:
            for name, value in zip(self._names, (self._logged / self._logged_steps).tolist(), strict=True):
                logs[name] = value
            self._logged, self._logged_steps = None, 0
        super().log(logs, start_time)

    # evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """On several ranks each row is evaluated once: no rank repeats rows of another to fill its last batch."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            data = self.eval_dataset[eval_dataset]
        self._own_batches = None
        ranks, size = self.args.world_size, self.args.eval_batch_size
        if ranks == 1 or not has_length(data) or not hasattr(data, "__getitem__"):
            return super().get_eval_dataloader(eval_dataset)
        own = list(range(self.args.process_index, len(data), ranks))
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        self._own_batches = len(batches)
        most = math.ceil(math.ceil(len(data) / ranks) / size)
        batches += [[0]] * (most - len(batches))  # every rank makes as many steps; what these give is not counted
        return DataLoader(
            Subset(data, range(len(data))),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.data_collator,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        if not self._evaluated:
            raise ValueError("the evaluation data hold no rows; give rows, or set eval_strategy to 'no'")
        rows = torch.stack(self._evaluated)
        rows = rows if rows.device.type == "mps" else rows.double()
        totals = self._over_ranks(rows.sum(0)).tolist()
        self._evaluated = []
        if totals[1] == 0:
            raise ValueError("the evaluation data have weight 0: no token counts; check labels and masks")
        assert output.metrics is not None
        for name, total in zip(("loss", *self._names), (totals[0], *totals[2:]), strict=True):
            output.metrics[f"{metric_key_prefix}_{name}"] = total / totals[1]
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            row = self._row(*self._run(model, self._prepare_inputs(inputs)))
        counts = self._own_batches is None or len(self._evaluated) < self._own_batches
        self._evaluated.append(row if counts else torch.zeros_like(row))
        return row[0] / row[1], None, None

    # both

    def _run(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Any]]:
        """The objective on the model, within the forward pass of its wrapper where it has one."""
        with self.accelerator.autocast():
            loss, stats = run_inside(model, self.objective, batch)
        if loss.dim() != 0 or "weight" not in stats:
            raise ValueError(
                f"objective {describe(self.objective)} must return a scalar sum and stats['weight'], its denominator; it "
                f"returned shape {tuple(loss.shape)} and {', '.join(map(repr, stats)) or 'no stats'}"
            )
        return loss, stats

    def _row(self, loss: Tensor, stats: Mapping[str, Any]) -> Tensor:
        """Loss, weight and the other stats in the order of their names, (2 + n,) float32."""
        names = tuple(sorted(name for name in stats if name != "weight"))
        if self._names and names != self._names:
            raise ValueError(
                f"objective {describe(self.objective)}: the stats changed from {self._names} to {names} between batches"
            )
        self._names = names
        values = [loss, stats["weight"], *(stats[name] for name in names)]
        return torch.stack([torch.as_tensor(v, device=loss.device).detach().float().reshape(()) for v in values])

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values


def run_inside(model: nn.Module, objective: Objective, batch: Any) -> tuple[Tensor, Mapping[str, Any]]:
    """`objective(inner, batch)` as the forward pass of a data-parallel wrapper around `inner`.

    Wrappers prepare gradients and gather parameters in their own forward, which an objective that calls parts of the
    model would go round.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if not isinstance(model, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
        return objective(model, batch)
    inner = model.module if isinstance(model, DistributedDataParallel | FullyShardedDataParallel) else model
    own = inner.__dict__.get("forward")  # accelerate may have put one there

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def forward(batch: Any) -> tuple[Tensor, Mapping[str, Any]]:
        restore()
        return objective(inner, batch)

    inner.forward = forward
    try:
        return model(batch)
    finally:
        restore()


def _set_apart(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Moves the parameters of `groups` out of the groups of an optimizer that has not stepped yet, into these."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    moved = [{**group, "params": [p for p in group["params"] if id(p) in held]} for group in groups]
    taken = {id(parameter) for group in moved for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    for group in moved:
        if group["params"]:
            optimizer.add_param_group(group)


def _scale_gradients(model: nn.Module, factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # a shard of a DTensor
            by_device.setdefault(local.device, []).append(local)
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, factor.to(device))
