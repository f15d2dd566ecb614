"""How many steps a model of recurrent depth runs: chosen from outside, for good or for a while."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from trialist.models.recurrent_depth.loop import RecurrentDepth
from trialist.models.recurrent_depth.settings import settings_of, split_steps, with_changes

Model = TypeVar("Model", bound=nn.Module)


def depth_of(model: nn.Module) -> RecurrentDepth:
    """The recurrent depth inside `model`, also in PEFT and compiled wrappers. Raises ValueError where there is none."""
    found = next((module for module in model.modules() if isinstance(module, RecurrentDepth)), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no recurrent depth; build it with depth='recurrent', or see to_recurrent"
        )
    return found


def with_steps(model: Model, num_steps: int, **options: Any) -> Model:
    """A model that shares all weights with `model` and runs `num_steps` steps, whatever a call says.

    As `assistant_model` of `model.generate` it drafts for the full model: self-speculation without loss. options: further
    call options for it (`exit_criterion`, `kv_slots`, ...).
    """
    depth_of(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    draft = copy.deepcopy(model, shared)
    depth = depth_of(draft)
    with_changes(depth.config, num_steps=num_steps, **options)
    depth.pinned = True
    return draft


def set_num_steps(model: nn.Module, num_steps: int) -> None:
    """Changes the number of steps of evaluation, in place. Raises ValueError for a model without recurrent depth."""
    with_changes(depth_of(model).config, num_steps=num_steps)


def set_mean_recurrence(model: nn.Module, mean_recurrence: int) -> None:
    """Changes r_bar of a model in place, between passes: in training the mean number of steps may rise with time."""
    with_changes(depth_of(model).config, mean_recurrence=mean_recurrence)


@contextlib.contextmanager
def deterministic_scoring(model: nn.Module, num_steps: int | None = None) -> Iterator[None]:
    """Inside, passes in training mode run `num_steps` steps (None: those of evaluation) from the s_0 of evaluation.

    For objectives that compare log-probabilities of several passes (GRPO, PPO): with a number of steps drawn anew their
    ratios would be wrong. Gradients flow through the last k steps as ever.
    """
    depth = depth_of(model)
    before = depth.fixed_steps
    depth.fixed_steps = settings_of(depth.config).steps if num_steps is None else num_steps
    split_steps(depth.fixed_steps, 1)
    try:
        yield
    finally:
        depth.fixed_steps = before
