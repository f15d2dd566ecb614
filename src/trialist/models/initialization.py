"""Initial weights that depend on seed and parameter name only."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel

from trialist.models.decoder import ModularDecoderPreTrainedModel


def initialize_(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter of `model` anew, in place, by the model's own rule and a generator keyed by (seed, its
    name). Layers that were swapped in are drawn by theirs, buffers start as in a new model.

    Two models that share a parameter's name, shape and rule get the same values in it, whatever else they hold: an arm
    with additional parameters leaves all others unchanged. Tied parameters are drawn once, by their first name. The
    global random state is left as it was. Raises ValueError for parameters that are not on the CPU, where the draws
    would differ, and for a parameter that no rule draws.
    """
    parameters = dict(model.named_parameters())
    elsewhere = next((name for name, parameter in parameters.items() if parameter.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ValueError(
            f"{elsewhere} is on {parameters[elsewhere].device}; initialise on the CPU and move the model then"
        )
    modules = dict(model.named_modules())
    # transformers' initialisers skip what carries this flag, so a module's rule can be run for one parameter alone.
    for parameter in parameters.values():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for buffer in model.buffers():  # loaded ones carry it: statistics of other weights
        buffer._is_hf_initialized = False  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for name, parameter in parameters.items():
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big"))
                before = parameter.clone()
                parameter.fill_(torch.nan)
                parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                path = name.split(".")[:-1]
                for depth in range(len(path), -1, -1):  # the owner first: the rule of an outer module may override it
                    _draw(model, modules[".".join(path[:depth])])
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                if parameter.isnan().any():
                    parameter.copy_(before)
                    raise ValueError(
                        f"no rule of {type(model).__name__} draws {name}; give the module that holds it "
                        "`draw_initial_weights()`, which draws by transformers.initialization"
                    )
    finally:
        for parameter in parameters.values():
            del parameter._is_hf_initialized  # type: ignore[attr-defined]


def _draw(model: PreTrainedModel, module: nn.Module) -> None:
    model._init_weights(module)
    if not isinstance(model, ModularDecoderPreTrainedModel) and hasattr(module, "draw_initial_weights"):
        module.draw_initial_weights()  # a module of ours, swapped into a model whose rule does not know it
