"""What the class of a saved model tells about its tensors: embeddings, tied names, linear layers, names that are not weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Linear:
    """Where a linear layer stands in the model with its head, and whether its weight is (inputs, outputs), as GPT-2's are."""

    module: str
    transposed: bool


@dataclass(frozen=True)
class Architecture:
    """Names as they stand in checkpoints: of the model with its head, or of the model without one."""

    by_token: frozenset[str]
    """Tensors whose first dimension is the vocabulary: embedding, head, the head's bias"""
    tied: dict[str, str]
    """Name -> the name whose tensor it shares"""
    linear: dict[str, Linear]
    """Weights of linear layers, the head left out"""
    ignored: tuple[str, ...]
    """Patterns of names that old checkpoints hold and the class does not read"""
    read: frozenset[str]
    """Names that the class does read"""
    modules: frozenset[str]
    prefix: str

    def tied_to(self, tensor: str) -> list[str]:
        """Names that share a tensor, in the model with its head."""
        return [name for name, source in self.tied.items() if source in (tensor, self.prefix + tensor)]

    def module_of(self, tensor: str) -> str:
        """The module that holds a tensor, in the model with its head."""
        stem = tensor.rpartition(".")[0]
        return stem if stem in self.modules else self.prefix + stem

    def ignores(self, name: str) -> bool:
        # a pattern such as `attn.bias` also finds the weight c_attn.bias
        return name not in self.read and any(re.search(pattern, name) for pattern in self.ignored)


def architecture_of(folder: Path) -> Architecture | None:
    """What transformers knows about the model in `folder`, without its weights; None for a class that it does not have."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError, OSError, KeyError):  # code of the repository's own, or no causal language model
        return None
    names = _Names(model)
    head = model.get_output_embeddings()
    by_token = [model.get_input_embeddings().weight]
    if head is not None:
        by_token += [tensor for tensor in (head.weight, getattr(head, "bias", None)) if tensor is not None]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    linear = {
        alias: Linear(name, isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        for alias in names.aliases(f"{name}.weight")
    }
    return Architecture(
        by_token=frozenset(name for tensor in by_token for name in names.of(tensor)),
        tied=dict(tied) if config.get_text_config().tie_word_embeddings else {},
        linear=linear,
        read=frozenset(alias for name in model.state_dict() for alias in names.aliases(name)),
        modules=frozenset(name for name, _ in model.named_modules()),
        prefix=f"{model.base_model_prefix}.",
        ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )


@dataclass(frozen=True)
class _Names:
    model: PreTrainedModel

    def aliases(self, name: str) -> tuple[str, ...]:
        """A model saved without its head lacks the prefix, for example `transformer.`, in every name."""
        prefix = f"{self.model.base_model_prefix}."
        return (name, name.removeprefix(prefix)) if name.startswith(prefix) else (name,)

    def of(self, tensor: torch.Tensor) -> list[str]:
        found = [name for name, other in self.model.named_parameters(remove_duplicate=False) if other is tensor]
        return [alias for name in found for alias in self.aliases(name)]
