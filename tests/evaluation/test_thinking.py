from __future__ import annotations

import pytest

from trialist.evaluation.thinking import evaluations, ngram_repetition, thinking_metrics


def test_the_scaling_of_a_line_is_its_slope_whatever_the_budgets():
    records = [{"tokens": tokens, "accuracy": 0.1 + 0.0002 * tokens} for tokens in (100, 250, 900, 3000)]
    found = thinking_metrics(records)
    assert found.scaling == pytest.approx(0.2)  # per 1,000 tokens
    assert found.performance == pytest.approx(0.7)
    assert (found.control, found.skipped_pairs) == (1.0, 0)


def test_a_worked_case():
    records = [
        {"tokens": 100, "accuracy": 0.2, "maximum": 100},
        {"tokens": 300, "accuracy": 0.6, "maximum": 200},
        {"tokens": 300, "accuracy": 0.5, "maximum": 400, "minimum": 301},
        {"tokens": 500, "accuracy": 0.4, "minimum": 400},
    ]
    found = thinking_metrics(records)
    slopes = [0.4 / 200, 0.3 / 200, 0.2 / 400, -0.2 / 200, -0.1 / 200]  # the pair of 300 and 300 has none
    assert found.scaling == pytest.approx(1000 * sum(slopes) / 5)
    assert (found.control, found.performance, found.skipped_pairs) == (0.5, 0.6, 1)


def test_order_does_not_matter_and_equal_tokens_have_no_slope():
    records = [{"tokens": tokens, "accuracy": accuracy} for tokens, accuracy in ((5, 0.1), (9, 0.4), (7, 0.9))]
    assert thinking_metrics(records) == thinking_metrics(records[::-1])
    assert thinking_metrics([records[0], records[0]]).scaling is None


def test_rows_of_items_become_an_evaluation_a_budget():
    rows = [
        {"maximum": 8, "tokens": 4, "correct": 1}, {"maximum": 8, "tokens": 8, "correct": 0},
        {"maximum": 16, "tokens": 12, "correct": 1},
    ]  # fmt: skip
    assert evaluations(rows) == [
        {"tokens": 6.0, "accuracy": 0.5, "minimum": None, "maximum": 8},
        {"tokens": 12.0, "accuracy": 1.0, "minimum": None, "maximum": 16},
    ]
    assert thinking_metrics(evaluations(rows)).scaling == pytest.approx(1000 * 0.5 / 6)
    ignoring = [{"num_ignore": n % 2, "tokens": n, "correct": 1} for n in range(4)]
    assert [one["tokens"] for one in evaluations(ignoring, by="num_ignore")] == [1.0, 2.0]


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert ngram_repetition([1, 2, 3, 1, 2, 3, 1, 2], n=3) == pytest.approx(3 / 6)
    assert ngram_repetition([7] * 10, n=4) == pytest.approx(6 / 7)
    assert ngram_repetition(["a", "b", "c", "d"], n=2) == 0
    assert ngram_repetition([1, 2, 3]) is None


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "no evaluations"),
        ([{"tokens": 1, "accuracy": 0.5}, {"tokens": 2}], "record 2: 'accuracy' is None"),
        ([{"tokens": 1, "accuracy": 50}], "a share"),
        ([{"tokens": float("inf"), "accuracy": 0.5}], "record 1"),
        ([{"tokens": 1, "accuracy": True}], "must be a number"),
    ],
)
def test_records_that_say_nothing_are_refused(records, words):
    with pytest.raises(ValueError, match=words):
        thinking_metrics(records)
