"""Text from tokens as they come, against the text of all of them at once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trialist.data.tokenizers import bpe_tokenizer, byte_tokenizer
from trialist.decoding.detokenizer import Detokenizer, StopStrings, token_bytes, token_text

TEXT = "Grüße, 世界! 👩‍🔬 writes naïve code … 🇯🇵\n\tand more. " * 3


@pytest.fixture(scope="module")
def pieces_tokenizer() -> Any:
    """Like SentencePiece: words carry their space, characters that no piece has are written as bytes."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581the",
        "\u2581cat",
        "s",
        "\u2581",
        "é",
    ]
    tokenizer = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[], byte_fallback=True,
                                     unk_token="<unk>"))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def streamed(tokenizer: Any, ids: list[int], before: list[int] = []) -> list[str]:  # noqa: B006
    detokenizer = Detokenizer(tokenizer, before)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def plain(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("size", [0, 300, 400])
def test_pieces_are_whole_characters_and_together_the_text(size):
    tokenizer = bpe_tokenizer([TEXT], size, cache=False) if size else byte_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(TEXT) // 4  # it comes bit by bit


def test_random_bytes_come_as_the_decoder_shows_them_and_are_never_held_for_long():
    tokenizer = byte_tokenizer()
    chance = random.Random(0)
    for _ in range(40):
        ids = [chance.randrange(256) for _ in range(70)]
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == bytes(ids).decode("utf-8", "replace") == plain(tokenizer, ids)
    assert len("".join(streamed(tokenizer, [0xF0] * 30)[:-1])) >= 26


def test_words_keep_their_spaces_and_bytes_become_characters(pieces_tokenizer):
    tokenizer = pieces_tokenizer
    the, cat, s, space = (tokenizer.convert_tokens_to_ids(piece) for piece in ("\u2581the", "\u2581cat", "s", "\u2581"))
    emoji = [2 + byte for byte in "👩é".encode()]
    ids = [the, cat, s, *emoji, space, *emoji, the, *[cat, s] * 20]
    assert "".join(streamed(tokenizer, ids)) == plain(tokenizer, ids)
    assert "".join(streamed(tokenizer, ids, before=[the, cat])) == " " + plain(tokenizer, ids)  # a text that goes on
    pieces = streamed(tokenizer, [*emoji, the])
    assert pieces == ["", "", "", "👩", "", "é", " the", ""]
    assert (token_text(tokenizer, cat), token_bytes(tokenizer, cat)) == (" cat", list(b" cat"))
    assert token_bytes(tokenizer, emoji[0]) == [0xF0]


def test_special_tokens_are_no_text():
    tokenizer = byte_tokenizer()
    ids = [*b"ab", tokenizer.eos_token_id, *b"c"]
    assert streamed(tokenizer, ids) == ["a", "b", "", "c", ""]


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    assert streamed(byte_tokenizer(), [*b"a", 0xF0, 0x9F]) == ["a", "", "", "\ufffd"]


def test_bytes_of_a_token_are_told_within_characters():
    tokenizer = byte_tokenizer()
    assert [token_bytes(tokenizer, byte) for byte in (65, 0xF0, 0x9F)] == [[65], [0xF0], [0x9F]]
    assert token_text(tokenizer, 0xF0) == "\ufffd"


def naive(text: str, stops: list[str]) -> str:
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


@pytest.mark.parametrize("stops", [["END"], ["aab"], ["ab", "ba"], ["\n\n", "x"], []])
def test_stop_strings_cut_wherever_the_pieces_are_cut(stops):
    chance = random.Random(1)
    for _ in range(60):
        text = "".join(chance.choice("abxEND\n") for _ in range(30)) + chance.choice(["END", ""])
        filtered, found, at = StopStrings(stops), "", 0
        while at < len(text):
            end = at + chance.randrange(1, 5)
            found += filtered.push(text[at:end])
            at = end
            assert naive(text, stops).startswith(found)
        found += filtered.flush()
        assert found == naive(text, stops)
        assert filtered.found == any(stop in text for stop in stops)


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    stops = StopStrings(["<end>"])
    assert [stops.push(piece) for piece in ("a<e", "nx", "<", "en", "d", ">b", "c")] == [
        "a",
        "<enx",
        "",
        "",
        "",
        "",
        "",
    ]
    assert stops.found
    assert stops.flush() == ""
