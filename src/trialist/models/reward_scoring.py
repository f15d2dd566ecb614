"""A reward model with its tokenizer: the rewards of rows of preferences, and of answers as they are generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trialist.data.preferences import PreferencePair, encode_preferences, notes
from trialist.data.tokenizers import load_tokenizer
from trialist.models.loading import model_context, model_digest
from trialist.models.reward_model import load_reward_model, padding_token, pair_rewards, sequence_rewards

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class RewardScorer:
    """Reads answers as `trialist train reward` and `trl.RewardTrainer` do, so that rewards are read where they were learnt.

    A conversation is all that the chat template makes of it; a string prompt with its answer has the tokenizer's special tokens,
    and an end-of-sequence token behind.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    length: int
    """Most tokens of a prompt with its answer; longer answers lose their end"""
    context: int | None
    """Most tokens that the model takes, None where its configuration does not say"""
    batch: int
    """Sequences in a forward pass"""
    digest: str
    """Of the model and of what else decides about the bits of its rewards"""

    @classmethod
    def load(
        cls, name: str, *, length: int | None = None, batch: int = 16, dtype: str = "float32", device: str = "cpu"
    ) -> RewardScorer:
        """name: Hub id, local folder or adapter of a reward model.   length: without it 1024, or the model's context.

        Raises ValueError for a model without a head for a reward, a length beyond the context, and as `load_reward_model` does.
        """
        tokenizer, context = load_tokenizer(name), model_context(name)
        if length is not None and context is not None and length > context:
            raise ValueError(f"--length {length} is longer than {name} takes, {context} tokens")
        padding = padding_token(tokenizer)
        model, new = load_reward_model(name, dtype=dtype, device=device, pad_token_id=padding)
        if new:
            raise ValueError(
                f"model {name!r} is no reward model: it has no head for a reward; make one with `trialist train reward`"
            )
        most = length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
        return cls(model, tokenizer, most, context, batch, f"{model_digest(name)} {dtype} {torch.device(device).type}")

    def encode(
        self, rows: Sequence[Mapping[str, Any]], *, source: str, drop_long: bool, say: Callable[[str], None]
    ) -> list[PreferencePair]:
        """Pairs of rows that `read_preferences` returned, with a note of what was cut or left out.

        drop_long: leave out rows whose prompt fills the model's context, instead of an error.
        """
        context = None if drop_long else self.context
        pairs, counts = encode_preferences(
            rows, self.tokenizer, max_length=self.length, context=context, source=source, whole=True
        )
        for note in notes(counts, self.length):
            say(f"note: {source}: {note}")
        return pairs

    def of_pairs(
        self, pairs: Sequence[PreferencePair], say: Callable[[str], None]
    ) -> tuple[list[tuple[float, float]], int]:
        """The rewards of chosen and rejected of each pair, and how many distinct sequences they are.

        They are kept in the user's cache, so that an interrupted call goes on where it was.
        """
        return pair_rewards(
            self.model, pairs, pad_token_id=padding_token(self.tokenizer), batch=self.batch, digest=self.digest, say=say
        )

    def rewards(self, prompts: Sequence[Any], completions: Sequence[Any], **others: Any) -> list[float]:
        """The reward of each answer: a function as `reward_funcs` of TRL's trainers take it.

        prompts, completions: strings, or lists of messages.
        """
        sequences = [self._tokens(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        padding = padding_token(self.tokenizer)
        return sequence_rewards(self.model, sequences, pad_token_id=padding, batch=self.batch).tolist()

    def _tokens(self, prompt: Any, answer: Any) -> list[int]:
        tokenizer: Any = self.tokenizer
        if not isinstance(prompt, str):
            rendered = tokenizer.apply_chat_template([*prompt, *answer], return_dict=True)
            return list(rendered["input_ids"])[: self.length]
        ids, end = list(tokenizer(prompt + answer, verbose=False)["input_ids"]), tokenizer.eos_token_id
        return (ids if end is None or ids[-1:] == [end] else [*ids, end])[: self.length]
