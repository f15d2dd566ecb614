"""Reward models: one number for a sequence, from transformers' sequence classification with one label."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from trialist.data.assets import cache_folder
from trialist.data.kept import kept_parts, remove_unused
from trialist.data.preferences import PreferencePair
from trialist.models.attention_interface import plain_model
from trialist.models.loading import model_source

HEADS = ("score", "classifier", "classification_head", "qa_outputs", "summary")
"""Names of heads that turn a hidden state into a reward"""
POOLERS = ("pooler", "bert.pooler")
"""Layers before such a head that a language model has no use for, new with it"""
PASS = 256
"""Tokens that a pass through the model is worth, however short: below, padding is cheaper than one more pass"""
PART = 2048
"""Sequences in a file of rewards, about: what an interruption can lose"""
SWAPS = ("selective_attention", "eviction")


def load_reward_model(
    model: str, *, dtype: str = "float32", device: str = "cpu", pad_token_id: int | None = None, seed: int = 0
) -> tuple[PreTrainedModel, bool]:
    """A sequence-classification model with one label in evaluation mode, and whether its head is new.

    A reward model is taken as it is; of a language model the body is, and a head is drawn by `seed`; a PEFT adapter is merged
    into the model that it names. The head stays in float32 and computes in it, also under autocast: a new head has the most to
    learn, by steps that bfloat16 would lose, and rewards of 8 bits tie.
    model: Hub id, local folder or asset.   dtype: of the body.   pad_token_id: written to the configuration, by which
    transformers finds the last token of a padded sequence, whose hidden state is the one scored.
    Raises ValueError that says what is missing or in the way: no such model, another number of labels, weights of the body
    that are missing, an architecture without sequence classification.
    """
    source = model_source(model)
    if (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file():
        return _with_adapter(model, source, dtype=dtype, device=device, pad_token_id=pad_token_id, seed=seed)
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
    if config.is_encoder_decoder:
        raise ValueError(
            f"model {model!r} has an encoder and a decoder, whose heads read padded batches in ways of their own; take a model "
            "that is a decoder or an encoder alone (Llama, Qwen, Gemma, GPT-2, BERT, ...)"
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
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ValueError(
            f"model {model!r} could not be loaded for sequence classification ({type(error).__name__}: {reason[:300]}); a "
            "reward model is made of a model that transformers has this head for (Llama, Qwen, Gemma, GPT-2, BERT, ...)"
        ) from error
    finally:
        logging.set_verbosity(shown)
    head = [name for name in found["missing_keys"] if name.startswith(tuple(f"{part}." for part in (*HEADS, *POOLERS)))]
    if missing := sorted(set(found["missing_keys"]) - set(head)):
        raise ValueError(
            f"model {model!r} lacks {len(missing)} of the weights of a {type(loaded).__name__}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; they would be drawn at random. Its files may be incomplete"
        )
    keep_heads_exact(loaded)
    return loaded.to(device).eval(), bool(head)


def _with_adapter(model: str, source: str, **options: Any) -> tuple[PreTrainedModel, bool]:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(source)
    if not config.base_model_name_or_path:
        raise ValueError(f"adapter {model!r} names no model in its adapter_config.json (base_model_name_or_path)")
    try:
        base, new = load_reward_model(config.base_model_name_or_path, **options)
    except ValueError as error:
        raise ValueError(f"{model!r} is an adapter of {config.base_model_name_or_path!r}: {error}") from error
    config.task_type = None  # those of language models ask for functions that a reward model has not
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys")
        try:
            merged: Any = PeftModel.from_pretrained(base, source, config=config).merge_and_unload()
        except (ValueError, RuntimeError, KeyError, UserWarning) as error:
            raise ValueError(
                f"adapter {model!r} could not be put on a {type(base).__name__} of {config.base_model_name_or_path!r} "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0][:300]}); was it trained on another model?"
            ) from error
    saved = set(getattr(config, "modules_to_save", None) or ())
    return merged.eval(), new and not saved & set(heads_of(base))


def heads_of(model: nn.Module) -> list[str]:
    """The names of its children that are heads for a reward."""
    return [name for name, _ in model.named_children() if name in HEADS]


class _Exact:
    """Mixed into a head: computes in the precision of its weights, whatever stands around it."""

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = next(self.parameters()).dtype  # type: ignore[attr-defined]
            return super().forward(hidden.to(dtype), *arguments, **options)  # type: ignore[misc]


def keep_heads_exact(model: nn.Module) -> None:
    """Heads for a reward have float32 weights and compute outside autocast: rewards of 8 bits would tie where they are close."""
    for name in heads_of(model):
        head = getattr(model, name)
        if next(head.parameters()).dtype != torch.float64:
            head.float()
        kind = type(head)
        head.__class__ = type(kind.__name__, (_Exact, kind), {"__module__": kind.__module__})


def sequence_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The reward of each sequence, (N,) float32, of a float64 model float64.

    input_ids, attention_mask: (N, T); which tokens are real the mask alone says, on whichever side the padding stands and
    whatever fills it. The model gets them padded on the right with the padding token of its configuration, as by that
    transformers finds the last token, and sequences of similar length together where that saves work.
    Raises ValueError where there is padding and the configuration has no such token, and for more than one label.
    """
    config: Any = plain_model(model).config
    fill, mask = config.get_text_config().pad_token_id, attention_mask.bool()
    lengths = mask.sum(1)
    if fill is None and not bool(mask.all()):
        raise ValueError(
            "the batch has padding and model.config.pad_token_id is None, so the model cannot find the last token; set it to "
            "the tokenizer's padding token"
        )
    order = (~mask).long().argsort(dim=1, stable=True)  # (N, T), real tokens first
    mask = mask.gather(1, order)
    input_ids = input_ids.gather(1, order)
    input_ids = input_ids if fill is None else input_ids.masked_fill(~mask, fill)
    sizes = lengths.tolist()
    by_length = sorted(range(len(sizes)), key=lambda n: -sizes[n])
    scores = []
    for part in _passes([sizes[n] for n in by_length]):
        rows = torch.tensor(by_length[part], device=input_ids.device)
        longest = sizes[by_length[part.start]]
        logits = model(input_ids=input_ids[rows, :longest], attention_mask=mask[rows, :longest].long()).logits
        if logits.shape != (len(rows), 1):
            raise ValueError(
                f"the model's logits have shape {tuple(logits.shape)}, wanted {(len(rows), 1)}: one reward a sequence; load it "
                "with num_labels=1"
            )
        scores.append(logits[:, 0] if logits.dtype == torch.float64 else logits[:, 0].float())
    back = torch.tensor(by_length, device=input_ids.device).argsort()
    return torch.cat(scores)[back]


def _passes(sizes: Sequence[int]) -> list[slice]:
    """Sequences, longest first, cut where tokens with padding, and `PASS` for each pass, are fewest in all."""
    edges = [n for n in range(len(sizes)) if n == 0 or sizes[n] < sizes[n - 1]] + [len(sizes)]
    least, begin = [0], [0]
    for end in range(1, len(edges)):
        costs = [least[n] + sizes[edges[n]] * (edges[end] - edges[n]) + PASS for n in range(end)]
        least.append(min(costs))
        begin.append(costs.index(least[-1]))
    cuts, end = [], len(edges) - 1
    while end:
        cuts.append(slice(edges[begin[end]], edges[end]))
        end = begin[end]
    return cuts[::-1]


def sequence_rewards(
    model: nn.Module,
    sequences: Iterable[Sequence[int]],
    *,
    pad_token_id: int,
    batch: int = 16,
    digest: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The reward of each sequence of token ids, float32 (N,) on the CPU; equal sequences are scored once.

    The longest come first, so that too little memory shows at once; sequences of similar length share a batch.
    digest: of the model and of what else decides about its bits, such as type and device. With it rewards are kept in the user's
        cache, in files of about 2,000: an interrupted call goes on with those that are missing, and processes that make
        the same call at one time share them out. Without it nothing is kept.
    progress: told how many of the distinct sequences are done.
    """
    asked = [np.asarray(sequence, np.int32).tobytes() for sequence in sequences]
    distinct = sorted(set(asked), key=lambda ids: (-len(ids), ids))
    device = next(model.parameters()).device
    size = max(1, PART // batch) * batch
    parts = [distinct[start : start + size] for start in range(0, len(distinct), size)]
    done = 0

    def score(number: int) -> np.ndarray:
        found = []
        for start in range(0, len(parts[number]), batch):
            rows = [
                torch.from_numpy(np.frombuffer(ids, np.int32).copy()) for ids in parts[number][start : start + batch]
            ]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id).long()  # (B, T)
            mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
            with torch.no_grad():
                found.append(sequence_scores(model, ids.to(device), mask.to(device)).float().cpu())
            if progress is not None:
                progress(done + start + len(rows), len(distinct))
        return torch.cat(found).numpy()

    def count(number: int) -> None:
        nonlocal done
        done += len(parts[number])

    if digest is None:
        values = []
        for number in range(len(parts)):
            values.append(score(number))
            count(number)
    else:
        key = hashlib.sha256(f"{digest} {pad_token_id} {batch} {len(distinct)}".encode())
        for part in distinct:
            key.update(len(part).to_bytes(8, "little") + part)
        place = cache_folder() / "rewards" / key.hexdigest()[:32]
        values = kept_parts(place, list(map(len, parts)), score, found=count)
        remove_unused(place.parent)
    known = dict(zip(distinct, np.concatenate(values).tolist(), strict=True)) if distinct else {}
    return torch.tensor([known[ids] for ids in asked])


def pair_rewards(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    *,
    pad_token_id: int,
    batch: int = 16,
    digest: str | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[list[tuple[float, float]], int]:
    """The rewards of chosen and rejected of each pair, and how many distinct sequences they are: each is scored once.

    digest: as in `sequence_rewards`.
    """
    sequences = ([*pair.prompt, *answer] for pair in pairs for answer in (pair.chosen, pair.rejected))
    scored = 0
    tenths = [0]

    def progress(done: int, total: int) -> None:
        nonlocal scored
        scored = total
        if say is not None and 10 * done // total > tenths[0]:
            tenths[0] = 10 * done // total
            say(f"scored {done:,} of {total:,} sequences")

    rewards = sequence_rewards(
        model, sequences, pad_token_id=pad_token_id, batch=batch, digest=digest, progress=progress
    ).tolist()
    return list(zip(rewards[::2], rewards[1::2])), scored


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

    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="SEQ_CLS",
        modules_to_save=heads_of(model) or None,
    )  # fmt: skip
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, lora)
