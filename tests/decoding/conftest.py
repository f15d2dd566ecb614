"""A tokenizer of single characters for the vocabulary of the tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trialist.data.tokenizers import byte_tokenizer
from trialist.decoding import flags
from trialist.models import initialize_

from ..models.conftest import SIZES, VOCABULARY, sharpen

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:W\n<>"


@pytest.fixture(scope="session")
def character_tokenizer() -> Any:
    pieces = ["<pad>", "<s>", "</s>", *CHARACTERS]
    assert len(pieces) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """A token a byte, with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def byte_model(chat_tokenizer) -> Any:  # type: ignore[no-untyped-def]
    """A model of bytes whose text is random but not flat."""
    special = {name: getattr(chat_tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {**SIZES, "vocab_size": len(chat_tokenizer), "max_position_embeddings": 512, **special}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
    initialize_(model, 0)
    sharpen(model)
    with torch.no_grad():  # letters more often than not, and no end before it is asked for
        model.lm_head.weight[97:123] *= 1.6
        model.lm_head.weight[chat_tokenizer.eos_token_id] = 0.0
    return model.eval()


@pytest.fixture
def scripted(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Registers the technique of `fake_technique`, beside those that there are."""
    from . import fake_technique

    for technique, path in fake_technique.FLAGS.items():
        monkeypatch.setitem(flags.FLAGS, technique, path)
