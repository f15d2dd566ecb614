"""What the class of a saved model tells about its tensors: embeddings, tied names, linear layers, names that are not weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Linear:
    """The module of a linear layer, and whether its weight is (inputs, outputs), as GPT-2's are."""

    module: str
    transposed: bool


@dataclass(frozen=True)
class Place:
    """The parameter or buffer that a stored tensor goes to. whole: as it is; otherwise cut, stacked or turned on the way, as the
    matrices of single experts are."""

    name: str
    whole: bool


@dataclass(frozen=True)
class Architecture:
    """Names as the model with its head has them; `place` finds them for the names in a checkpoint."""

    place: Callable[[str], Place | None]
    """Where a tensor of a checkpoint goes when transformers loads it; None for what the class does not read"""
    by_token: frozenset[str]
    """What has the vocabulary as its first dimension: embedding, head, the head's bias"""
    tied: dict[str, str]
    """Name -> the name whose tensor it shares"""
    linear: dict[str, Linear]
    """Weights of linear layers, the head left out"""
    parameters: frozenset[str]
    leaves: frozenset[str]
    """Modules that hold no other ones"""
    ignored: tuple[str, ...]
    """Patterns of names that old checkpoints hold and the class does not read"""

    def ignores(self, name: str) -> bool:
        # a pattern such as `attn.bias` also finds the weight c_attn.bias
        return self.place(name) is None and any(re.search(pattern, name) for pattern in self.ignored)

    def is_by_token(self, name: str) -> bool:
        place = self.place(name)
        return place is not None and place.whole and place.name in self.by_token

    def is_parameter(self, name: str) -> bool:
        place = self.place(name)
        return place is not None and place.name in self.parameters

    def stored_twice(self, names: Collection[str]) -> dict[str, str]:
        """Of the names in a checkpoint those that share another one's tensor -> that name."""
        stored = {place.name: name for name in names if (place := self.place(name)) is not None}
        pairs = ((stored.get(name), stored.get(source)) for name, source in self.tied.items())
        return {name: source for name, source in pairs if name is not None and source is not None}


def architecture_of(folder: Path) -> Architecture | None:
    """What transformers knows about the model in `folder`, without its weights; None for a class that it does not have.

    Code that the folder brings along is not run.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, ImportError, OSError, KeyError):  # code of the repository's own, or no causal language model
        return None
    head = model.get_output_embeddings()
    by_token = [model.get_input_embeddings().weight]
    if head is not None:
        by_token += [tensor for tensor in (head.weight, getattr(head, "bias", None)) if tensor is not None]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    linear = {
        f"{name}.weight": Linear(name, isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and not isinstance(module, NonDynamicallyQuantizableLinear)  # its weight is used, but it is never called
    }
    return Architecture(
        place=_places(model),
        by_token=frozenset(name for name, one in parameters.items() if any(one is other for other in by_token)),
        tied=dict(tied) if config.get_text_config().tie_word_embeddings else {},
        linear=linear,
        parameters=frozenset(parameters),
        leaves=frozenset(name for name, module in model.named_modules() if not any(module.children())),
        ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )


def _places(model: PreTrainedModel) -> Callable[[str], Place | None]:
    """By the conversions that loading does: checkpoints lack the head's prefix, have older names, or single experts."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    there = model.state_dict()

    @functools.cache
    def place(name: str) -> Place | None:
        for first, second in ((renamings, converters), ([], [])):
            found, pattern = rename_source_key(name, first, second, model.base_model_prefix, there)
            if found in there:
                return Place(found, pattern is None)
        return None

    return place
