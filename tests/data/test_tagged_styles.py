"""The made-up language of styles: what its texts say can be counted, so the counts are held against the rules."""

from __future__ import annotations

import numpy as np
import pytest

from trialist.data.tagged_styles import BOS, EOS, IGNORED, StyleLanguage, Trigrams

LANGUAGE = StyleLanguage(seed=3)


def test_the_style_of_a_text_can_be_read_off_its_words():
    texts, styles, tags = LANGUAGE.draw(2_000, 1)
    own = [LANGUAGE.adherence(text, style) for text, style in zip(texts, styles)]
    assert 0.9 < np.mean(own) < 0.99
    assert np.isclose(np.mean(styles == tags), 0.65, atol=0.04)


def test_at_a_noise_of_three_quarters_the_tag_says_nothing():
    _, styles, tags = StyleLanguage(3, noise=0.75).draw(8_000, 1)
    assert np.isclose(np.mean(styles == tags), 0.25, atol=0.02)


def test_adherence_by_hand():
    word = LANGUAGE.first_word
    first, second = word + 12 + 0, word + 4 * 12 + 3  # a style word of style 0, and one of style 1
    assert LANGUAGE.adherence([first, word, EOS], 0) == 1.0
    assert LANGUAGE.adherence([first, second], 0) == LANGUAGE.adherence([first, second], 1) == 0.5
    assert LANGUAGE.adherence([first, second], 2) == 0.0
    assert LANGUAGE.adherence([word, EOS], 0) == LANGUAGE.adherence([], 0) == 0.0


def test_words_follow_the_order_of_roles_and_texts_end():
    for text in LANGUAGE.draw(50, 2)[0]:
        assert text[-1] == EOS
        words = [token - LANGUAGE.first_word for token in text[:-1]]
        assert len(words) % 6 == 0
        assert [word // 12 for word in words] == [place % 6 for place in range(len(words))]
        assert len(text) + 2 <= LANGUAGE.longest


def test_batches_predict_the_text_and_neither_tag_nor_padding():
    batch = LANGUAGE.batch(40, 5, 0)
    tagged = 0
    for ids, mask, labels in zip(*(batch[name].tolist() for name in ("input_ids", "attention_mask", "labels"))):
        assert ids[0] == BOS
        head = 1 + (ids[1] < LANGUAGE.first_word)
        tagged += head - 1
        end = ids.index(EOS) + 1
        assert mask == [1] * end + [0] * (len(ids) - end)
        assert labels == [IGNORED] * head + ids[head:end] + [IGNORED] * (len(ids) - end)
    assert 20 < tagged < 40
    assert batch["input_ids"].tolist() == LANGUAGE.batch(40, 5, 0)["input_ids"].tolist()
    assert batch["input_ids"].tolist() != LANGUAGE.batch(40, 5, 1)["input_ids"].tolist()


def test_trigrams_are_a_distribution_after_every_text_and_by_hand():
    model = Trigrams([[3, 4, 2], [3, 5, 2]], 6)
    total = sum(np.exp(model.score([3, token]) - model.score([3])) for token in range(6))
    assert total == pytest.approx(1.0)
    three, two, one = 1 / 2, 1 / 2, 1 / 6
    assert np.exp(model.score([3, 4]) - model.score([3])) == pytest.approx(
        0.7 * three + 0.2 * two + 0.09 * one + 0.01 / 6
    )
