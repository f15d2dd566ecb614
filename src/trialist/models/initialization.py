"""Initial weights that depend on seed and parameter name only."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel


def initialize_(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter of `model` anew, in place, by the model's own rule and a generator keyed by (seed, its
    name).

    Two models that share a parameter's name, shape and rule get the same values in it, whatever else they hold: an arm
    with additional parameters leaves all others unchanged. Tied parameters are drawn once, by their first name. The
    global random state is left as it was. Raises ValueError for parameters that are not on the CPU, where the draws
    would differ.
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
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for name, parameter in parameters.items():
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big"))
                parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                path = name.split(".")[:-1]
                for depth in range(len(path), -1, -1):  # the owner first: the rule of an outer module may override it
                    model._init_weights(modules[".".join(path[:depth])])
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    finally:
        for parameter in parameters.values():
            del parameter._is_hf_initialized  # type: ignore[attr-defined]
