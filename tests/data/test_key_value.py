"""Lists of keys and values, and questions about them."""

from __future__ import annotations

import pytest
import torch

from trialist.data.key_value import KeyValueBatches, KeyValueVocabulary, key_value_text
from trialist.data.tokenizers import byte_tokenizer

WORDS = KeyValueVocabulary(keys=9, values=5)


def test_every_answer_is_the_value_that_stands_with_its_key():
    batch = KeyValueBatches("recall", 6, 0, 7, 4, WORDS)(2)
    tokens, labels = batch["input_ids"], batch["labels"]
    assert tokens.shape == labels.shape == (6, 7 + 2 + 8)
    for row, answers in zip(tokens.tolist(), labels.tolist()):
        assert row[0] == WORDS.bos
        assert row[8] == WORDS.separator
        pairs = dict(divmod(token, 5) for token in row[1:8])
        assert len(pairs) == 7
        asked = row[9::2]
        assert len(set(asked)) == 4
        for key, answer, label, between in zip(asked, row[10::2], answers[10::2], answers[9::2]):
            assert pairs[key - WORDS.first_key] == answer - WORDS.first_value
            assert (label, between) == (answer, -100)
        assert answers[:10] == [-100] * 10


def test_chance_answers_come_from_the_whole_vocabulary_whatever_the_list_says():
    right = KeyValueBatches("recall", 200, 0, 7, 4, WORDS)(0)
    chance = KeyValueBatches("chance", 200, 0, 7, 4, WORDS)(0)
    assert torch.equal(right["input_ids"][:, :9], chance["input_ids"][:, :9])
    same = (right["input_ids"][:, 10::2] == chance["input_ids"][:, 10::2]).double().mean()
    assert abs(same - 0.2) < 0.06


def test_a_batch_depends_on_seed_and_step_alone():
    source = KeyValueBatches("recall", 3, 5, 7, 4, WORDS)
    assert torch.equal(source(1)["input_ids"], KeyValueBatches("recall", 3, 5, 7, 4, WORDS)(1)["input_ids"])
    assert not torch.equal(source(1)["input_ids"], source(2)["input_ids"])
    assert not torch.equal(source(1)["input_ids"], KeyValueBatches("recall", 3, 6, 7, 4, WORDS)(1)["input_ids"])


def test_words_name_each_asked_code_as_the_list_does():
    tokenizer = byte_tokenizer()
    prompt, questions, labels = key_value_text(tokenizer, 6, 3, seed=4)
    assert torch.equal(prompt, key_value_text(tokenizer, 6, 3, seed=4)[0])
    listed = tokenizer.decode(prompt[0], skip_special_tokens=True).splitlines()
    asked = tokenizer.decode(questions[0]).splitlines()
    assert (len(listed), len(set(listed)), len(asked)) == (6, 6, 3)
    assert set(asked) < set(listed)
    answers = tokenizer.decode(labels[0][labels[0] >= 0]).split()
    assert answers == [line.rstrip(".").split()[-1] for line in asked]
    assert torch.equal(questions[labels >= 0], labels[labels >= 0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KeyValueBatches("guess", 1, 0, 3, 2, WORDS), "'guess' is unknown"),
        (lambda: KeyValueBatches("recall", 1, 0, 10, 2, WORDS), "pairs 10"),
        (lambda: KeyValueBatches("recall", 1, 0, 3, 4, WORDS), "asked is 4"),
        (lambda: key_value_text(byte_tokenizer(), 3, 4, seed=0), "asked is 4"),
    ],
)
def test_numbers_that_cannot_be_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
