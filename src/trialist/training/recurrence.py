"""Recurrent depth while it is trained: number of steps, their mean and the health of the loop as functions of the training step,
in `fit` and in the Hugging Face Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from trialist.models.deterministic import deterministic_scoring
from trialist.models.recurrent_depth.health import recurrence_gain, token_correlation
from trialist.models.recurrent_depth.settings import whole
from trialist.models.recurrent_depth.steps import depth_of, find_depth, set_mean_recurrence


class RecurrenceCallback(TrainerCallback):
    """All passes of a training step draw the same number of steps, from (seed, step): on every rank, in every micro-batch,
    before and after a resume, also where a checkpoint holds adapters alone.

    Without it a model counts its training passes, in a buffer that goes into its checkpoints; then micro-batches differ in
    depth, and a run on two ranks draws others than one on a single process. The seed is `config.recurrent["seed"]`.

    mean: r_bar as a function of the training step, from 0 on, for a mean that rises while training goes on; None leaves it.
    health: held-out `input_ids` and, where there is padding, `attention_mask`, `(B, T)`, on which `token_correlation` of the
        final states and `recurrence_gain` are measured every `health_every` steps, the last one included. Both go into
        `state.log_history`, beside `step`.

    Raises ValueError at the start of training when the model has no recurrent depth, and for `health_every` below 1.
    """

    def __init__(
        self,
        mean: Callable[[int], int] | None = None,
        health: Mapping[str, Tensor] | None = None,
        health_every: int = 100,
    ) -> None:
        self.mean, self.health, self.health_every = mean, health, whole("health_every", health_every)
        self.measured = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        depth_of(objects["model"]).by_step = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        depth_of(objects["model"]).passes.fill_(state.global_step)
        if self.mean is not None:
            set_mean_recurrence(objects["model"], self.mean(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step % self.health_every == 0:
            self._measure(objects["model"], state)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self._measure(objects["model"], state)
        depth_of(objects["model"]).by_step = False

    def _measure(self, model: nn.Module, state: Any) -> None:
        if self.health is None or self.measured == state.global_step:
            return
        self.measured = state.global_step
        device = next(model.parameters()).device
        ids, mask = (
            None if (x := self.health.get(name)) is None else x.to(device) for name in ("input_ids", "attention_mask")
        )
        assert ids is not None
        state.log_history.append(
            {
                "step": state.global_step,
                "token_correlation": token_correlation(final_states(model, ids, mask), mask),
                "recurrence_gain": recurrence_gain(model, ids, mask),
            }
        )


@torch.no_grad()
def final_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """s_r `(B, T, d)` of a pass in evaluation mode, at the steps of evaluation."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        states = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            exit_criterion=None,
            output_latent_states=True,
        ).latent_states
    finally:
        for module, mode in modes.items():
            module.training = mode
    return states[-1]


@contextlib.contextmanager
def alike_passes(trainer: Trainer, *, compared: bool) -> Iterator[None]:
    """Inside, a trainer whose model has recurrent depth runs one number of steps in all passes of a training step.

    compared: whether log-probabilities of several passes are compared, by an objective that needs model and reference to
        compute what they do in evaluation: at the steps of evaluation, without dropout, with running statistics.
    """
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    if find_depth(models[0]) is not None:
        trainer.add_callback(RecurrenceCallback())
    with contextlib.ExitStack() as stack:
        for model in models if compared else ():
            stack.enter_context(deterministic_scoring(model))
        yield
