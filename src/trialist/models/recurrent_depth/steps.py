"""How many steps a model of recurrent depth runs: chosen from outside, for good or for a while."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from trialist.models.recurrent_depth.loop import RecurrentDepth
from trialist.models.recurrent_depth.settings import whole, with_changes

Model = TypeVar("Model", bound=nn.Module)


def find_depth(model: nn.Module) -> RecurrentDepth | None:
    """The recurrent depth inside `model`, also in PEFT and compiled wrappers; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, RecurrentDepth)), None)


def depth_of(model: nn.Module) -> RecurrentDepth:
    """`find_depth`, which raises ValueError where there is none."""
    found = find_depth(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no recurrent depth; build it with depth='recurrent', or see to_recurrent"
        )
    return found


def with_steps(model: Model, num_steps: int, **options: Any) -> Model:
    """A model that shares all weights with `model` and runs `num_steps` steps, whatever a call says.

    As `assistant_model` of `model.generate` it drafts for the full model: self-speculation, without loss where one pass over
    several tokens computes what decoding them one by one does. Where it does not, `generate` refuses it: with `warm_start`,
    with fewer `kv_slots` than steps, and with exit criteria that look through a coda. options: further call options for the new
    model (`exit_criterion`, `kv_slots`, ...). It is not compiled, also where `model` is.

    Raises ValueError for options that cannot work and for a model that accelerate has spread over devices.
    """
    model = getattr(model, "_orig_mod", model)
    depth_of(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    draft = copy.deepcopy(model, shared)
    for module in draft.modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{type(module).__name__} is run through hooks of accelerate, which cannot be shared; load the model on one "
                "device, without device_map"
            )
        if not hasattr(module, "_orig_mod"):
            module.__dict__.pop("forward", None)  # what torch.compile put there runs the module that was copied
    depth = depth_of(draft)
    with_changes(depth.config, num_steps=whole("num_steps", num_steps), **options)
    depth.pinned, depth.scoring = True, None
    return draft


def set_num_steps(model: nn.Module, num_steps: int) -> None:
    """Changes the number of steps of evaluation, in place. Raises ValueError for a model without recurrent depth and for a
    number that cannot be; the model then stays as it was."""
    with_changes(depth_of(model).config, num_steps=whole("num_steps", num_steps))


def set_mean_recurrence(model: nn.Module, mean_recurrence: int) -> None:
    """Changes r_bar of a model in place, between passes: in training the mean number of steps may rise with time. Raises
    ValueError as `set_num_steps`."""
    with_changes(depth_of(model).config, mean_recurrence=whole("mean_recurrence", mean_recurrence))
