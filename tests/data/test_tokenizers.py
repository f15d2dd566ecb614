from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trialist.data.tokenizers import (
    bpe_tokenizer,
    byte_tokenizer,
    document_start,
    encode_documents,
    is_byte_tokenizer,
    load_tokenizer,
)

AWKWARD = [
    "plain",
    " leading and trailing ",
    "tabs\tand\r\nCRLF\n\n",
    "".join(map(chr, range(0x250))),
    "emoji 👩‍👩‍👧‍👦 🇫🇷, 漢字, العربية, \u2028\u200b\ufeff",
    "says <bos> and <eos><pad>",
    "don't , . 's  [UNK]",
    "",
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return bpe_tokenizer(["the cat sat on the mat\n" * 5, "def f(x):\n    return x\n" * 4], 300, cache=False)


@pytest.mark.parametrize("text", AWKWARD)
def test_a_byte_is_a_token_whose_id_is_the_byte(text: str):
    tokenizer = byte_tokenizer()
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_bpe_round_trips_any_text_without_special_tokens(bpe: PreTrainedTokenizerFast, text: str):
    ids = bpe(text)["input_ids"]
    assert bpe.decode(ids) == text
    assert not set(ids) & set(bpe.all_special_ids)


def test_both_survive_saving_and_loading(tmp_path: Path, bpe: PreTrainedTokenizerFast):
    for name, tokenizer in (("bytes", byte_tokenizer()), ("bpe", bpe)):
        tokenizer.save_pretrained(tmp_path / name)
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert isinstance(again, PreTrainedTokenizerFast)
        for text in AWKWARD:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert again.decode(again(text)["input_ids"]) == text
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id, len(again)) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            len(tokenizer),
        )
        assert is_byte_tokenizer(again) == (name == "bytes")


def test_the_byte_tokenizer_has_259_tokens_and_its_specials_decode_to_their_names():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 259
    assert tokenizer.convert_ids_to_tokens([256, 257, 258]) == ["<bos>", "<eos>", "<pad>"]
    assert tokenizer.decode([256, 104, 105, 257], skip_special_tokens=True) == "hi"


def test_documents_encode_as_the_tokenizer_does(bpe: PreTrainedTokenizerFast):
    for tokenizer in (byte_tokenizer(), bpe):
        encoded = encode_documents(tokenizer, AWKWARD)
        assert [ids.tolist() for ids in encoded] == [tokenizer(text)["input_ids"] for text in AWKWARD]
    assert encode_documents(bpe, []) == []


def test_bpe_learns_frequent_words_from_its_texts_and_has_the_asked_size():
    tokenizer = bpe_tokenizer(["banana bandana " * 50], 280, cache=False)
    assert len(tokenizer) <= 280
    assert len(bpe_tokenizer([" ".join(f"word{i} other{i * 7}" for i in range(500))], 411, cache=False)) == 411
    assert len(tokenizer(" bandana")["input_ids"]) == 1
    assert len(tokenizer(" quux")["input_ids"]) == 5


def test_bpe_training_is_deterministic_and_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path))
    texts = [f"some text number {i} of the corpus" for i in range(40)]
    first = bpe_tokenizer(texts, 320)
    assert first.get_vocab() == bpe_tokenizer(texts, 320, cache=False).get_vocab()
    folders = [path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()]
    assert len(folders) == 1
    monkeypatch.setattr("trialist.data.tokenizers._train_bpe", lambda *_: pytest.fail("trained again"))
    again = bpe_tokenizer(texts, 320)
    assert again("some text <eos>")["input_ids"] == first("some text <eos>")["input_ids"]
    with pytest.raises(pytest.fail.Exception):
        bpe_tokenizer([*texts, "more"], 320)
    assert [path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()] == folders


def test_a_failed_training_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        bpe_tokenizer(["text"], 300)
    assert not [path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()]


def test_a_document_starts_with_bos_else_eos():
    tokenizer = byte_tokenizer()
    assert document_start(tokenizer) == 256
    tokenizer.bos_token = None
    assert document_start(tokenizer) == 257
    tokenizer.eos_token = None
    assert document_start(tokenizer) is None


def test_too_small_vocabularies_and_empty_texts_are_refused():
    with pytest.raises(ValueError, match="at least 259"):
        bpe_tokenizer(["a"], 258)
    with pytest.raises(ValueError, match="every text is empty"):
        bpe_tokenizer(["", ""], 300)


def test_a_model_folder_without_tokenizer_says_what_was_expected_and_found(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"has no tokenizer: expected tokenizer\.json.*found config\.json; save one"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="no tokenizer could be loaded"):
        load_tokenizer("owner/no-such-model")


def test_the_tokenizer_of_a_given_model_is_used(shared_data: Path):
    tokenizer = load_tokenizer(str(shared_data / "stories260k"))
    assert len(tokenizer) == 512
    ids = encode_documents(tokenizer, ["Once upon a time"])[0]
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids).strip() == "Once upon a time"
    assert is_byte_tokenizer(load_tokenizer("bytes"))
