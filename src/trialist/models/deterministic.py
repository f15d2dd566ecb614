"""Passes in training mode that compute what passes in evaluation mode do, for objectives that compare several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trialist.models.attention_interface import plain_model
from trialist.models.recurrent_depth.settings import whole
from trialist.models.recurrent_depth.steps import depth_of, find_depth


@contextlib.contextmanager
def deterministic_scoring(model: nn.Module, num_steps: int | None = None) -> Iterator[None]:
    """Inside, passes in training mode compute what passes in evaluation mode do: without dropout and with the running
    statistics of PEER's queries, which stay; with recurrent depth at `num_steps` steps (None: those of evaluation) from the s_0
    of evaluation.

    For objectives that compare log-probabilities of several passes (DPO, GRPO, PPO): with tokens normalised by those beside
    them, or a number of steps drawn anew, their ratios would be wrong. Gradients flow as ever, in a loop through the last k
    steps, and activations are checkpointed where they were; the backward pass then belongs inside as well, for it runs the
    layers again. No token exits early unless a call says so. Raises ValueError for num_steps without recurrent depth.
    """
    depth = find_depth(model) if num_steps is None else depth_of(model)
    scoring = Scoring(model, None if num_steps is None else whole("num_steps", num_steps))
    before = None if depth is None else depth.scoring
    if depth is not None:
        depth.scoring = scoring
    outer, plain = getattr(model, "_orig_mod", model), plain_model(model)
    inner = getattr(plain, "base_model", plain)
    hooks = [part.register_forward_pre_hook(scoring.switch) for part in {outer, inner}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if depth is not None:
            depth.scoring = before
        if inner.training or inner in scoring.switched:  # else the model was put into evaluation meanwhile
            for module in scoring.switched:
                module.training = True


class Scoring:
    """The number of steps while scores are held, and the parts that stop training meanwhile.

    Those are switched at each pass, because whoever trains a model may call its `train()` before each step.
    """

    def __init__(self, model: nn.Module, num_steps: int | None) -> None:
        self.num_steps = num_steps
        # what contains layers stays in training mode, in which it asks for checkpointed activations and for no cache
        self.parts = [
            module
            for module in model.modules()
            if not any(isinstance(part, GradientCheckpointingLayer) for part in module.modules() if part is not module)
        ]
        self.switched: set[nn.Module] = set()

    def switch(self, *_: object) -> None:
        for module in self.parts:
            if module.training and not getattr(module, "gradient_checkpointing", False):
                self.switched.add(module)
                module.training = False
