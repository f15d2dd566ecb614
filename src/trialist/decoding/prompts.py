"""From what a user says to tokens: messages through the model's chat template, or text to go on with; lengths; padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trialist.decoding.settings import MOST_TOKENS

Messages = list[dict[str, str]]
"""A conversation, with `role` and `content` each"""


@dataclass(frozen=True)
class Prompt:
    """content: what options are told, messages or text. token_ids: what the model is given. continues: whether the
    continuation is more of the same text, not an answer."""

    content: Messages | str
    token_ids: tuple[int, ...]
    continues: bool


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Text to be continued, with the special tokens that the tokenizer puts first. Raises ValueError where it is empty."""
    if not text:
        raise ValueError("the prompt is empty; give some text to go on with")
    _check_characters(text)
    ids: Any = tokenizer(text)["input_ids"]
    eos = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]  # some tokenizers end every text, and there would be nothing to continue
    return _checked(text, ids, continues=True)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Prompt:
    """A conversation up to the answer that is asked for. Raises ValueError for a model without a chat template, for an empty
    conversation, and in the template's own words where that refuses it."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template; give it text to go on with (--raw, or /v1/completions)")
    if not messages or not messages[-1]["content"].strip():
        raise ValueError("the prompt is empty; say what is to be answered")
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template of the model refuses this conversation: {error}") from error
    _check_characters(text)
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _checked(messages, ids, continues=False)


def token_prompt(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> Prompt:
    """Tokens to be continued. Raises ValueError for one that the tokenizer does not have."""
    wrong = [token for token in token_ids if not 0 <= token < len(tokenizer)]
    if wrong:
        raise ValueError(f"the prompt has the token {wrong[0]}; the model's are 0 to {len(tokenizer) - 1}")
    text: Any = tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
    return _checked(text, list(token_ids), continues=True)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start]
        raise ValueError(f"the prompt holds {wrong!a}, which is half of a character; write it whole") from error


def _checked(content: Messages | str, ids: list[int], *, continues: bool) -> Prompt:
    if not ids:
        raise ValueError("the prompt has no tokens; give some text")
    return Prompt(content, tuple(ids), continues)


def context_length(model: Any) -> int | None:
    """Tokens that the model takes at most, prompt and continuation; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def token_limit(model: Any, prompt: Prompt, max_new_tokens: int | None) -> int:
    """Tokens that a continuation of `prompt` may have. Raises ValueError, with both lengths, where the context is too short."""
    context, length = context_length(model), len(prompt.token_ids)
    left = None if context is None else context - length
    if left is not None and left < 1:
        raise ValueError(
            f"the prompt has {length:,} tokens and the model's context is {context:,}, which leaves none for a continuation; "
            "shorten the prompt"
        )
    if max_new_tokens is not None:
        if left is not None and max_new_tokens > left:
            raise ValueError(
                f"the prompt has {length:,} tokens, and with {max_new_tokens:,} new ones that is more than the model's context "
                f"of {context:,}; shorten the prompt, or ask for at most {left:,} new tokens"
            )
        return max_new_tokens
    config = model.generation_config
    most = config.max_new_tokens or (config.max_length - length if config.max_length else 0)
    return min(most if most > 0 else MOST_TOKENS, left or MOST_TOKENS)


def left_padded(prompts: Sequence[Prompt], pad: int, device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, T) of prompts of any lengths."""
    T = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), T), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, T - len(prompt.token_ids) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
