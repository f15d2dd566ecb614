from __future__ import annotations

import pytest

from trialist.data.corpora import Documents
from trialist.data.samples import sample_halves, sample_text
from trialist.data.tokenizers import byte_tokenizer


def documents(*texts: str) -> Documents:
    return Documents(tuple(map(str, range(len(texts)))), texts, "texts")


MANY = documents(*(f"document {n} says {n * n} and é{n}" * (1 + n % 3) for n in range(40)))


def text_of(sample) -> set[str]:
    tokens, (_, offsets, sizes) = sample.rows.input_ids.flatten(), sample.rows.pieces.T
    return {bytes(tokens[o + 1 : o + n].tolist()).decode(errors="ignore")[:12] for o, n in zip(offsets, sizes)}


def test_the_bytes_of_a_sample_are_those_its_scored_tokens_stand_for():
    for tokens in (50, 200, 10**6):
        sample = sample_text(MANY, byte_tokenizer(), tokens=tokens, length=32)
        assert sample.bytes == sample.rows.scored  # a token of this tokenizer is a byte
        assert sample.rows.length == 32
        assert sample.bytes == pytest.approx(min(tokens, sum(len(text.encode()) for text in MANY.texts)), abs=2)


def test_a_sample_is_the_same_every_time_and_no_mere_beginning():
    first, again = (sample_text(MANY, byte_tokenizer(), tokens=300, length=32) for _ in range(2))
    assert (first.rows.tokens == again.rows.tokens).all()
    assert "document 0 s" not in text_of(first) or "document 1 s" not in text_of(first)


def test_no_document_is_in_both_halves():
    halves = sample_halves(MANY, byte_tokenizer(), tokens=10**6, length=4096)
    names = [{text.split(" says")[0] for text in text_of(half)} for half in halves]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) > 30


def test_text_of_one_document_cannot_be_halved():
    with pytest.raises(ValueError, match="cannot be split into 2 parts"):
        sample_halves(documents("alone"), byte_tokenizer(), tokens=10, length=8)


def test_a_tokenizer_without_a_token_to_begin_with_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        sample_text(MANY, tokenizer, tokens=10, length=8)
