from __future__ import annotations

import logging
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trialist.data.corpora import Documents
from trialist.data.tokenizers import bpe_tokenizer, byte_tokenizer
from trialist.evaluation.bits_per_byte import bits_per_byte, keeps_documents_apart

TEXTS = (
    "a short one",
    "b",
    "ein längerer Text — mit Umlauten: äöü 🎈\r\n" * 3,
    "tail of some size, 41 bytes",
    "x" * 15,
)
DOCUMENTS = Documents(tuple("abcde"), TEXTS, "made up")


def llama(vocabulary: int = 259, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        initializer_range=0.5,
        **settings,
    )
    return LlamaForCausalLM(config)


def by_hand(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, text: str, length: int, first: int) -> float:
    """Bits of one document: one window after the other, `first` tokens in the first one, alone in a batch, in float64."""
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    bits, start, size = 0.0, 0, first
    while start < len(ids) - 1:
        window = torch.tensor([ids[start : start + size]])
        with torch.no_grad():
            log_p = model(window, use_cache=False).logits[0].double().log_softmax(-1)
        for place in range(1, window.shape[1]):
            bits -= float(log_p[place - 1, window[0, place]]) / math.log(2)
        start += window.shape[1] - 1
        size = length
    return bits


def test_it_equals_a_loop_over_single_documents_in_float64():
    model = llama().double().eval()
    result = bits_per_byte(model, byte_tokenizer(), DOCUMENTS, length=64, batch_size=2)
    offset, expected = 0, {}
    for name, text in zip(DOCUMENTS.ids, TEXTS):
        offset += 1 if offset % 64 == 63 else 0
        room, size = 64 - offset % 64, len(text.encode()) + 1
        expected[name] = by_hand(model, byte_tokenizer(), text, 64, room)
        left = size - room
        while left > 0:  # every further row begins with a token of context
            offset += room
            size, room = left + 1, 64
            left = size - room
        offset += size
    for name, text in zip(DOCUMENTS.ids, TEXTS):
        bits, size = result.per_document[name]
        assert size == len(text.encode())
        assert bits == pytest.approx(expected[name], rel=1e-9)
    total = sum(len(text.encode()) for text in TEXTS)
    assert result.value == pytest.approx(sum(expected.values()) / total, rel=1e-9)


def test_documents_that_fit_a_window_are_scored_as_if_alone():
    model = llama().double().eval()
    short = Documents(("a", "b", "c"), ("one", "two words", "3"), "made up")
    result = bits_per_byte(model, byte_tokenizer(), short, length=64)
    for name, text in zip(short.ids, short.texts):
        assert result.per_document[name][0] == pytest.approx(by_hand(model, byte_tokenizer(), text, 64, 64), rel=1e-9)


@pytest.mark.parametrize("length", [2, 7, 64])
def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary_per_token(length: int):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = bits_per_byte(model, byte_tokenizer(), DOCUMENTS, length=length)
    assert result.value == pytest.approx(math.log2(259), rel=1e-6)


def test_256_uniform_bytes_cost_eight_bits_each():
    model = llama(256)
    torch.nn.init.zeros_(model.lm_head.weight)
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)  # a start within the vocabulary of 256
    assert bits_per_byte(model, tokenizer, DOCUMENTS, length=9).value == pytest.approx(8.0, rel=1e-6)


def test_bytes_are_counted_in_the_text_whatever_the_tokens():
    tokenizer = bpe_tokenizer(TEXTS, 290, cache=False)
    model = llama(len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    result = bits_per_byte(model, tokenizer, DOCUMENTS, length=11)
    for name, text in zip(DOCUMENTS.ids, TEXTS):
        tokens = len(tokenizer(text)["input_ids"])
        assert result.per_document[name] == (
            pytest.approx(tokens * math.log2(len(tokenizer)), rel=1e-6),
            len(text.encode()),
        )
    assert len(tokenizer(TEXTS[2])["input_ids"]) < len(TEXTS[2].encode()) / 2


def test_the_batch_size_changes_nothing():
    model = llama().double()
    values = [
        bits_per_byte(model, byte_tokenizer(), DOCUMENTS, length=13, batch_size=size).value for size in (1, 3, 64)
    ]
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-12)


class Leaky(LlamaForCausalLM):
    """Ignores restarting positions, as a model does whose layers carry a state from left to right."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model.register_forward_pre_hook(self.forget, with_kwargs=True)

    @staticmethod
    def forget(module: torch.nn.Module, arguments: tuple, options: dict) -> tuple:
        return arguments, options | {"position_ids": None}


def test_a_model_that_lets_packed_documents_leak_is_scored_window_by_window(caplog: pytest.LogCaptureFixture):
    sound = llama().double()
    leaky = Leaky(sound.config).double()
    leaky.load_state_dict(sound.state_dict())
    with torch.no_grad():
        assert keeps_documents_apart(sound.eval(), 256, torch.device("cpu"))
        assert not keeps_documents_apart(leaky.eval(), 256, torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        result = bits_per_byte(leaky, byte_tokenizer(), DOCUMENTS, length=13, batch_size=3)
    expected = bits_per_byte(sound, byte_tokenizer(), DOCUMENTS, length=13, batch_size=3)
    assert result.value == pytest.approx(expected.value, rel=1e-9)
    assert {name: bits for name, (bits, _) in result.per_document.items()} == pytest.approx(
        {name: bits for name, (bits, _) in expected.per_document.items()}, rel=1e-9
    )
    assert "a row of its own" in caplog.text


def test_learned_positions_work_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=32, n_embd=24, n_layer=2, n_head=3)).double().eval()
    short = Documents(("a", "b"), ("one", "two words"), "made up")
    result = bits_per_byte(model, byte_tokenizer(), short, length=32)
    for name, text in zip(short.ids, short.texts):
        assert result.per_document[name][0] == pytest.approx(by_hand(model, byte_tokenizer(), text, 32, 32), rel=1e-9)


def test_max_bytes_takes_documents_in_order_and_cuts_the_last_between_characters():
    model = llama()
    result = bits_per_byte(model, byte_tokenizer(), DOCUMENTS, length=32, max_bytes=12 + 6)
    assert {name: size for name, (_, size) in result.per_document.items()} == {
        "a": 11,
        "b": 1,
        "c": 5,
    }  # "ein l", not half an ä
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        bits_per_byte(model, byte_tokenizer(), DOCUMENTS, length=32, max_bytes=0)


def test_the_model_stays_in_its_mode_and_without_gradients():
    model = llama(attention_dropout=0.5).train()
    first = bits_per_byte(model, byte_tokenizer(), DOCUMENTS, length=32).value
    assert model.training
    assert bits_per_byte(model, byte_tokenizer(), DOCUMENTS, length=32).value == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_impossible_requests_name_what_is_wrong():
    model, tokenizer = llama(), byte_tokenizer()
    with pytest.raises(ValueError, match="length 65 is longer than the model's context of 64"):
        bits_per_byte(model, tokenizer, DOCUMENTS, length=65)
    with pytest.raises(ValueError, match="no documents is undefined"):
        bits_per_byte(model, tokenizer, Documents((), (), "none"), length=8)
    with pytest.raises(ValueError, match="token 256, beyond the model's vocabulary of 200"):
        bits_per_byte(llama(200), tokenizer, DOCUMENTS, length=8)
    with pytest.raises(ValueError, match="ids must be unique"):
        bits_per_byte(model, tokenizer, Documents(("a", "a"), ("x", "y"), "made up"), length=8)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        bits_per_byte(model, tokenizer, DOCUMENTS, length=8)
