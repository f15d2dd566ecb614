"""A tokenizer of single characters for the vocabulary of the tiny models."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..models.conftest import VOCABULARY

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
