"""From a checkpoint, sharded or not, to a model folder that `from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trialist.training.checkpoints import decode, intact_checkpoints
from trialist.training.shards import read_shards, shards_in


def consolidate(checkpoint: str | Path, model: PreTrainedModel, output: str | Path, *, step: int | None = None) -> Path:
    """Loads the weights of a checkpoint of `fit` into `model` and writes the model to the new folder `output`.

    One process does it, without torchrun; in a script under torchrun let rank 0 alone call it.

    checkpoint: the checkpoint folder. model: a whole model of the same class and sizes, on the CPU; its weights are
    replaced. step: which checkpoint; None: the newest that is intact.
    Raises FileNotFoundError when there is no such checkpoint, FileExistsError when `output` is there and not empty,
    ValueError when the model has other weights.
    """
    folder, output = Path(checkpoint), Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"output {output} is there already; give a new folder")
    found = next((found for found in intact_checkpoints(folder) if step in (None, found[1]["step"])), None)
    if found is None:
        which = "" if step is None else f" of step {step}"
        raise FileNotFoundError(f"checkpoint folder {folder} does not hold an intact checkpoint{which}")
    path, content, tensors = found
    state = dict(content["state"]["dict"])["model"]
    shards = shards_in(state)
    outlines = {name: torch.empty(shape, device="meta") for name, (shape, _) in shards.items()}
    stored = {name: tuple(tensor.shape) for name, tensor in decode(state, {**tensors, **outlines}).items()}
    given = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(name for name in {**stored, **given} if stored.get(name) != given.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"checkpoint {path} is of another model: {name} is {stored.get(name, 'absent')} there, "
            f"{given.get(name, 'absent')} in the model given ({len(differing)} weights differ); give a model of the same "
            "class and configuration"
        )
    tensors |= read_shards(path.with_suffix(""), shards, None)
    model.load_state_dict(decode(state, tensors))
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        if output.is_dir():
            output.rmdir()
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output
