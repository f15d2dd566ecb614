from __future__ import annotations

import random
import re
import unicodedata

import numpy as np
import pytest

from trialist.data.tokenizers import byte_tokenizer
from trialist.data.words import RULES, TokenWords, Words
from trialist.kernels.ngrams import Phrases

RULE_AND_FORM = [(rule, form) for rule in RULES for form in ("as-is", "nfkc", "unaccented", "plain")]
CHARACTERS = (
    "aB9_ \n\t\r,.?!:;()\"-\\'$+=<>[]{}éÉßİΣςσﬁＡ１…—“”\u00a0\u2003\u3000\u0301\u0327가각ᄀ\u1161日本語🎈\u200b\x1c\x00"
)


def random_text(chance: random.Random) -> str:
    return "".join(chance.choices(CHARACTERS, k=chance.randrange(60)))


def by_character(text: str, words: Words) -> list[str]:
    """The rules once more, character by character, on text that is normalised as a whole."""
    if words.unicode == "nfkc":
        text = unicodedata.normalize("NFKC", text)
    if words.unicode in ("unaccented", "plain"):
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    if words.unicode == "plain":
        for marks, plain in (("—", "-"), ("“”", '"')):
            text = re.sub(f"[{marks}]", plain, text)
    text = text.lower().replace("ς", "σ") if words.lower else text
    if words.numbers == "equal":
        numbers = "[0-9][0-9!-/:-@[-`{-~]*[0-9]|[0-9]" if words.rule == "bare" else "[0-9]+"
        text = re.sub(numbers, "0", re.sub("１", "1", text))
    found = [""]
    for character in text:
        if character.isspace() or (words.rule == "tulu3" and character in ',.?!:;()"-\\'):
            found.append("")
        elif words.rule == "bare" and character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~":
            continue
        elif words.rule == "code" and character.isascii() and not (character.isalnum() or character == "_"):
            found += [character, ""]
        else:
            found[-1] += character
    return [word for word in found if word]


@pytest.mark.parametrize(("rule", "form"), RULE_AND_FORM)
@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "as written"])
@pytest.mark.parametrize("numbers", ["as-is", "equal"])
def test_words_are_those_of_a_rule_read_character_by_character(rule, form, lower, numbers):
    words, chance = Words(rule, form, lower, numbers), random.Random(7)
    for _ in range(150):
        text = random_text(chance)
        assert [word.decode() for word in words.split(text)] == by_character(text, words), repr(text)


@pytest.mark.parametrize(("rule", "form"), RULE_AND_FORM)
def test_the_text_within_a_span_is_its_word(rule, form):
    words, chance = Words(rule, form), random.Random(8)
    for _ in range(150):
        text = random_text(chance)
        spans, split = words.spans(text), words.split(text)
        assert len(spans) == len(split)
        assert [begin for begin, _ in spans] == sorted(begin for begin, _ in spans)
        for (begin, end), word in zip(spans, split):
            if form == "as-is" or text[begin:end].isascii():
                assert words.split(text[begin:end]) == [word], (text, begin, end)
            else:  # one character may have become several words, each of which comes from all of it
                assert word in b" ".join(words.split(text[begin:end])), (text, begin, end)


@pytest.mark.parametrize(("rule", "form"), RULE_AND_FORM)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_search_cuts_texts_into_the_same_words(rule, form, backend):
    words, chance = Words(rule, form), random.Random(9)
    texts = [random_text(chance) for _ in range(60)]
    vocabulary = list(dict.fromkeys(word for text in texts for word in words.split(text)))
    every = np.arange(len(vocabulary))
    phrases = Phrases(vocabulary, every, every, np.ones(len(every)), words.kinds, words.lower, backend)
    document, phrase = phrases.search([words.encode([text]) for text in texts])
    found: list[set[bytes]] = [set() for _ in texts]
    for d, p in zip(document.tolist(), phrase.tolist()):
        found[d].add(vocabulary[p])
    assert found == [set(words.split(text)) for text in texts]


def test_worked_cases_of_each_rule():
    text = 'Don\'t say "e = m*c^2" - (ever)!'
    assert Words("tulu3").split(text) == [b"don't", b"say", b"e", b"=", b"m*c^2", b"ever"]
    assert Words("whitespace").split(text) == [b"don't", b"say", b'"e', b"=", b'm*c^2"', b"-", b"(ever)!"]
    assert Words("bare").split(text) == [b"dont", b"say", b"e", b"mc2", b"ever"]
    assert Words("code").split("a+=b1_;") == [b"a", b"+", b"=", b"b1_", b";"]


def test_compatible_characters_are_equal_only_where_asked():
    plain, nfkc, unaccented = (Words("tulu3", form) for form in ("as-is", "nfkc", "unaccented"))
    assert plain.split("ﬁx") != plain.split("fix")
    assert nfkc.split("ﬁx ＡＢ e\u0301") == nfkc.split("fix ab é")
    assert nfkc.split("é") != nfkc.split("e")
    assert unaccented.split("Café") == unaccented.split("cafe")


def test_plain_text_has_the_marks_of_a_keyboard():
    typeset = "He said “we don’t know” — and, then… ‹so›"
    typed = "He said \"we don't know\" - and, then... 'so'"
    for rule in RULES:
        assert Words(rule, "plain").split(typeset) == Words(rule).split(typed), rule
    assert Words("tulu3", "plain").split("他说，你好。") == Words("tulu3", "plain").split("他说,你好.")


def test_equal_numbers_are_one_number_and_keep_their_places():
    words = Words("tulu3", numbers="equal")
    text = "Ann has 12 apples, é, and 1200 pears for $3"
    assert words.split(text) == words.split("Ann has 7 apples, é, and 5 pears for $99")
    assert [text[begin:end] for begin, end in words.spans(text)] == [
        "Ann", "has", "12", "apples", "é", "and", "1200", "pears", "for", "$3"
    ]  # fmt: skip
    assert Words("bare", "plain", numbers="equal").split("1,200 or 3.5") == [b"0", b"or", b"0"]
    assert words.split("1,200") == [b"0", b"0"]


def test_white_space_beyond_ascii_separates_and_a_final_sigma_is_a_sigma():
    words = Words("tulu3")
    assert words.split("a\u00a0b\u3000c\u2028d") == [b"a", b"b", b"c", b"d"]
    assert words.split("ΟΔΟΣ") == words.split("οδοσ") == words.split("οδος")


def test_tokens_of_a_tokenizer_are_words_with_their_spans(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    words = TokenWords(str(tmp_path))
    assert words.split("aé") == [97, 0xC3, 0xA9]
    assert words.spans("a b") == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("given", "message"), [(("words",), "words 'words': one of"), (("tulu3", "nfd"), "unicode 'nfd'")]
)
def test_unknown_rules_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Words(*given)
