from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from trialist.decoding.precision.schedules import StaticSchedule, load_schedule, save_schedule
from trialist.decoding.precision.scoring import divergences, rouge_l, scheduled_logits, shared_prefix
from trialist.decoding.precision.tuning import train_scheduler, tune_static
from trialist.models.nested.precision import get_precision, precision
from trialist.training.precision_schedule import PrecisionClassifier

from ..models.conftest import VOCABULARY, tokens
from .nested_model import dense_model, nested_model, padded_rows


@pytest.fixture(scope="module")
def nested() -> Any:
    model = nested_model()
    model.generation_config.eos_token_id = None
    return model


def prompts(count: int) -> list[list[int]]:
    """Prompts of 3 to 8 tokens."""
    return [row[: 3 + number % 6] for number, row in enumerate(tokens(count, 8).tolist())]


def stepwise(model: Any, ids: torch.Tensor, continuation: torch.Tensor, bits: list[int], prefill: int) -> torch.Tensor:
    """Logits (T, V) of one row, one forward pass a token."""
    cache, found = DynamicCache(config=model.config), []
    for piece, precise in zip([ids, *continuation[:-1].split(1)], [prefill, *bits]):
        with precision(model, precise), torch.no_grad():
            found.append(model(input_ids=piece[None], past_key_values=cache, use_cache=True).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("bits", [[4, 4, 2, 2, 2], [2, 4, 2, 4, 4], [3] * 5], ids=["falling", "mixed", "one"])
def test_scored_logits_are_those_of_one_step_at_a_time_under_left_padding(nested, bits, monkeypatch):
    from trialist.decoding.precision import scoring

    ids, mask = padded_rows()
    continuation = tokens(3, 6)
    whole = torch.cat(list(scheduled_logits(nested, ids, mask, continuation, bits, 4)), 1)
    assert whole.shape == (3, 6, VOCABULARY)
    for row in range(3):
        expected = stepwise(nested, ids[row][mask[row].bool()], continuation[row], bits, 4)
        torch.testing.assert_close(whole[row], expected, atol=2e-4, rtol=1e-4)
    monkeypatch.setattr(scoring, "AT_ONCE", 2 * 3 * VOCABULARY)
    pieces = list(scheduled_logits(nested, ids, mask, continuation, bits, 4))
    assert max(piece.shape[1] for piece in pieces) <= 2
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-4, rtol=1e-4)
    assert get_precision(nested) == 4


def test_divergence_is_the_sum_over_tokens_by_hand_and_zero_from_itself(nested):
    ids, mask = padded_rows()
    continuation = tokens(3, 6)
    found = divergences(nested, nested, ids, mask, continuation, [4, 3, 2, 2, 2], 3)
    for row in range(3):
        prompt = ids[row][mask[row].bool()]
        p = stepwise(nested, prompt, continuation[row], [4] * 5, 4).double().softmax(-1)
        q = stepwise(nested, prompt, continuation[row], [4, 3, 2, 2, 2], 3).double().softmax(-1)
        expected = [sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(x, y)) for x, y in zip(p, q)]
        assert found[row].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert (found[:, 1:] > 0).all()
    assert divergences(nested, nested, ids, mask, continuation, [4] * 5, 4).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("text", "reference", "rouge", "prefix"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, 1.0),
        ([1, 9, 3, 4], [1, 2, 3, 4], 2 * 3 / 8, 0.25),
        ([2, 1, 3], [1, 2, 3, 4], 2 * 2 / 7, 0.0),
        ([], [1, 2], 0.0, 0.0),
        ([1, 2], [], 0.0, 1.0),
        ([], [], 1.0, 1.0),
        ([1, 1, 2, 1], [1, 2, 1, 1, 2], 2 * 3 / 9, 0.2),
    ],
)
def test_overlap_of_texts_by_hand(text, reference, rouge, prefix):
    assert rouge_l(text, reference) == pytest.approx(rouge)
    assert shared_prefix(text, reference) == pytest.approx(prefix)


def test_the_common_subsequence_is_that_of_the_textbook_table():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        m, n = (int(torch.randint(1, 90, (1,), generator=generator)) for _ in range(2))
        a, b = (torch.randint(0, 5, (size,), generator=generator).tolist() for size in (m, n))
        table = [[0] * (n + 1) for _ in range(m + 1)]
        for i in range(m):
            for j in range(n):
                table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
        assert rouge_l(a, b) == pytest.approx(2 * table[m][n] / (m + n))


def test_static_tuning_takes_the_fewest_steps_within_the_tolerance(nested):
    options = dict(steps=9, high=4, low=2, batch=3)
    strict = tune_static(nested, prompts(7), "kl", tolerance=0.0, **options)
    assert [row.high_steps for row in strict.candidates] == [0, 3, 6, 9]
    bits = [row.average_bits for row in strict.candidates]
    assert bits == pytest.approx([(4 + 8 * 2) / 9, (4 + 3 * 4 + 5 * 2) / 9, (4 + 6 * 4 + 2 * 2) / 9, 4.0])
    assert strict.schedule == StaticSchedule(4, 2, 9)
    assert strict.candidates[-1].loss == 0.0
    losses = [row.loss for row in strict.candidates]
    assert losses[0] > losses[1] > 0
    loose = tune_static(nested, prompts(7), "kl", tolerance=losses[1], **options)
    assert loose.schedule == StaticSchedule(4, 2, 3)
    assert "<- chosen" in loose.lines()[1]
    assert tune_static(nested, prompts(7), "kl", tolerance=1e9, **options).schedule.high_steps == 0
    assert get_precision(nested) == 4


def test_a_metric_of_a_task_is_told_prompts_and_texts_and_decides(nested):
    told: list[tuple[int, int]] = []

    def length_of_prompt(given: Any, texts: Any) -> list[float]:
        told.extend((len(prompt), len(text)) for prompt, text in zip(given, texts))
        return [0.5] * len(texts)

    found = tune_static(nested, prompts(4), length_of_prompt, (0.0,), 0.0, steps=5, high=4, low=2, batch=3)
    assert found.schedule.high_steps == 0
    assert sorted(told) == sorted([(len(prompt), 5) for prompt in prompts(4)] * 2)


def test_rouge_against_the_own_greedy_text_is_1_with_high_precision_throughout(nested):
    found = tune_static(nested, prompts(5), "rouge", (0.0,), 0.0, steps=8, high=4, low=2)
    assert found.candidates[-1].score == 1.0
    assert found.candidates[0].score < 1.0


def test_a_dense_reference_may_stand_for_full_precision(nested):
    dense = dense_model()
    found = tune_static(nested, prompts(4), "kl", (0.0,), 1e9, steps=6, high=3, low=2, reference=dense)
    assert found.candidates[-1].score < 0  # 3 bits are not the dense model
    assert found.candidates[0].score < found.candidates[-1].score


def test_an_end_of_text_counts_and_what_follows_it_does_not():
    model = nested_model()
    ids = torch.tensor([prompts(1)[0]])
    free = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
    model.generation_config.eos_token_id = end = free[3]
    length = free.index(end) + 1
    found = tune_static(model, prompts(1), "kl", (0.0,), steps=9, high=4, low=2)
    assert found.candidates[0].average_bits == pytest.approx((4 + 2 * (length - 1)) / length)
    text = torch.tensor([free[:length]])
    kl = divergences(model, model, ids, torch.ones_like(ids), text, [2] * (length - 1), 4)
    assert found.candidates[0].score == pytest.approx(-float(kl.mean()), rel=1e-4)
    assert found.candidates[0].half_width is None


def test_labels_are_the_fewest_steps_within_the_tolerance_prompt_by_prompt(nested, monkeypatch):
    from trialist.decoding.precision import tuning

    made, told = prompts(6), {}

    def noted(examples: Any, **options: Any) -> Any:
        told.update({example.prompt: example for example in examples}, options=options)
        return PrecisionClassifier(3, 4, 3), None

    monkeypatch.setattr(tuning, "fit_classifier", noted)
    learned, _ = train_scheduler(nested, made, "kl", (0.0, 0.5), 0.3, steps=8, high=4, low=2, batch=4, epochs=2)
    assert (learned.high_steps, learned.prefill_bits) == ((0, 4, 8), 4)
    assert told["options"] == {"heads": 3, "classes": 3, "seed": 0, "epochs": 2}
    labels = []
    for prompt in made:
        ids = torch.tensor([prompt])
        text = nested.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, len(prompt) :]
        means = [
            float(divergences(nested, nested, ids, torch.ones_like(ids), text, ([4] * h + [2] * 8)[:7], 4).mean())
            for h in (0, 4, 8)
        ]
        labels.append(next(at for at, mean in enumerate(means) if mean <= means[-1] + 0.3))
        cache = DynamicCache(config=nested.config)
        with torch.no_grad():
            nested(input_ids=ids, past_key_values=cache, use_cache=True)
        example = told[",".join(map(str, prompt))]
        assert example.label == labels[-1]
        torch.testing.assert_close(example.values, cache.layers[-1].values[0].mean(0))
    assert len(set(labels)) > 1


def test_a_trained_schedule_is_saved_and_chooses_the_same_again(nested, tmp_path):
    learned, report = train_scheduler(nested, prompts(20), "kl", (0.0,), 0.1, steps=4, high=4, low=2, epochs=1)
    assert report.words().split(":")[0] in ("better than prior", "no better than prior")
    save_schedule(learned, tmp_path)
    again = load_schedule(tmp_path)
    assert isinstance(again.classifier, PrecisionClassifier)
    keys, values, mask = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.ones(3, 6)
    assert torch.equal(again.classifier(keys, values, mask), learned.classifier(keys, values, mask))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": (0.0, 1.5)}, "the grid has 1.5"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"high": 2, "low": 3}, "high=2 is below low=3"),
        ({"high": 7}, "asks for 7 bits"),
        ({"metric": "bleu"}, "metric='bleu'"),
        ({"steps": 60}, "a prompt of 8 tokens and 60 steps are more than the model's context of 64"),
        ({"prompts": [[3], []]}, "at least one token id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(nested, changes, words):
    given = {"prompts": prompts(7), "steps": 8, **changes}
    with pytest.raises(ValueError, match=words):
        tune_static(nested, **given)
