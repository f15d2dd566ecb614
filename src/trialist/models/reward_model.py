"""Reward models: one number for a sequence, from transformers' sequence classification with one label."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from trialist.models.loading import model_source

HEADS = ("score.", "classifier.", "classification_head.", "qa_outputs.", "summary.")
"""Beginnings of the names of heads that turn a hidden state into a reward"""
SWAPS = ("selective_attention", "eviction")


def load_reward_model(
    model: str, *, dtype: str = "float32", device: str = "cpu", pad_token_id: int | None = None, seed: int = 0
) -> tuple[PreTrainedModel, bool]:
    """A sequence-classification model with one label in evaluation mode, and whether its head is new.

    A reward model is taken as it is; of a language model the body is, and a head is drawn by `seed`.
    model: Hub id, local folder or asset.   pad_token_id: written to the configuration, by which transformers finds the last
    token of a padded sequence, whose hidden state is the one scored.
    Raises ValueError that says what is missing or in the way: no such model, another number of labels, weights of the body
    that are missing, an architecture without sequence classification.
    """
    source = model_source(model)
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"model {model!r} is an adapter; merge it into its model first, or name that model")
    config = AutoConfig.from_pretrained(source)
    swapped = [name for name in SWAPS if isinstance(getattr(config, name, None), dict)]
    if swapped:
        raise ValueError(
            f"model {model!r} was saved with {swapped[0].replace('_', ' ')}, which a reward model cannot have"
        )
    classifies = any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise ValueError(
            f"model {model!r} tells {config.num_labels} classes apart; a reward model has one label, a language model or a "
            "reward model is needed"
        )
    config.num_labels, config.use_cache = 1, False
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if pad_token_id is not None and vocabulary is not None and pad_token_id >= vocabulary:
        raise ValueError(
            f"the padding token {pad_token_id} is beyond the vocabulary of {vocabulary} of model {model!r}; its tokenizer does "
            "not belong to it, or needs another pad_token"
        )
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head and a head less are what is wanted here, not worth a table
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded, found = AutoModelForSequenceClassification.from_pretrained(
                source, config=config, dtype=getattr(torch, dtype), output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ValueError(
            f"model {model!r} could not be loaded for sequence classification ({type(error).__name__}: {reason[:300]}); a "
            "reward model is made of a model that transformers has this head for (Llama, Qwen, Gemma, GPT-2, BERT, ...)"
        ) from error
    finally:
        logging.set_verbosity(shown)
    head = [name for name in found["missing_keys"] if name.startswith(HEADS)]
    if missing := sorted(set(found["missing_keys"]) - set(head)):
        raise ValueError(
            f"model {model!r} lacks {len(missing)} of the weights of a {type(loaded).__name__}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; they would be drawn at random. Its files may be incomplete"
        )
    return loaded.to(device).eval(), bool(head)


def sequence_rewards(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The reward of each sequence of token ids, float32 (N,) on the CPU; equal sequences are scored once.

    Sequences of similar length share a batch. progress: told how many of the distinct sequences are done.
    """
    distinct = sorted({tuple(sequence) for sequence in sequences}, key=lambda ids: (len(ids), ids))
    device = next(model.parameters()).device
    known: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for start in range(0, len(distinct), batch):
            part = distinct[start : start + batch]
            rows = [torch.tensor(ids) for ids in part]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)  # (B, T)
            mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
            scores: Any = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            known |= zip(part, scores[:, 0].float().tolist())
            if progress is not None:
                progress(min(start + batch, len(distinct)), len(distinct))
    return torch.tensor([known[tuple(sequence)] for sequence in sequences])


def padding_token(tokenizer: Any) -> int:
    """The tokenizer's padding token, made its end-of-sequence token where it has none, as TRL does; ValueError without both."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return int(tokenizer.pad_token_id)


def reward_adapters(model: PreTrainedModel, rank: int) -> Any:
    """The model with LoRA adapters of `rank` on the linear layers of its body; its head is trained whole and saved with them."""
    from peft import LoraConfig, get_peft_model

    head = [name for name, _ in model.named_children() if name in ("score", "classifier")]
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=head or None
    )
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, lora)
