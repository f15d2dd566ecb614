from __future__ import annotations

import math

import pytest
import torch

from trialist.training.precision_schedule import PrecisionClassifier, PromptExample, fit_classifier

H, D, C = 3, 4, 4


def example(number: int, label: int, values: torch.Tensor) -> PromptExample:
    P = len(values)
    keys = torch.randn(P, D, generator=torch.Generator().manual_seed(number))
    return PromptExample(keys, values, label, f"prompt {number}")


def separable(count: int) -> list[PromptExample]:
    """The label is where the values of the prompt lie; prompts have 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        label, P = number % C, 3 + number % 7
        values = torch.randn(P, D, generator=generator) * 0.3 + 2.0 * torch.eye(C)[label]
        found.append(example(number, label, values))
    return found


def by_chance(count: int) -> list[PromptExample]:
    """Labels that nothing tells, of unequal frequencies."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.multinomial(
        torch.tensor([0.6, 0.2, 0.15, 0.05]), count, replacement=True, generator=generator
    ).tolist()
    return [example(n, label, torch.randn(5, D, generator=generator)) for n, label in enumerate(labels)]


def test_the_classifier_is_the_naive_loop_of_its_formula():
    torch.manual_seed(2)
    model = PrecisionClassifier(H, D, C).eval()
    keys, values = torch.randn(2, 6, D), torch.randn(2, 6, D)
    mask = torch.ones(2, 6)
    mask[1, :2] = 0
    found = model(keys, values, mask).detach()
    model.requires_grad_(False)
    for row, begin in ((0, 0), (1, 2)):
        read = torch.zeros(D, H, dtype=torch.float64)
        for h in range(H):
            for q in range(H):
                scores = [float(model.probes[h, q] @ keys[row, t]) / math.sqrt(D) for t in range(begin, 6)]
                total = sum(math.exp(score) for score in scores)
                for t, score in zip(range(begin, 6), scores):
                    read[:, h] += math.exp(score) / total * values[row, t].double() / H
        expected = model.double().mlp(read.flatten())
        model.float()
        torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_and_the_batch_change_nothing():
    torch.manual_seed(3)
    model = PrecisionClassifier(H, D, C).eval()
    keys, values = torch.randn(1, 5, D), torch.randn(1, 5, D)
    alone = model(keys, values, torch.ones(1, 5))
    wide_keys, wide_values = torch.randn(3, 9, D) * 100, torch.randn(3, 9, D) * 100
    wide_keys[1, 4:], wide_values[1, 4:] = keys[0], values[0]
    mask = torch.ones(3, 9)
    mask[1, :4] = 0
    torch.testing.assert_close(model(wide_keys, wide_values, mask)[1], alone[0])


def test_values_that_encode_the_label_are_read_from_unseen_prompts():
    model, report = fit_classifier(separable(140), heads=H, classes=C, epochs=25, learning_rate=1e-2)
    assert not model.training
    assert report.accuracy > 0.95
    assert report.better_than_prior
    assert report.words().startswith("better than prior")
    assert report.counts == (35,) * 4


def test_labels_by_chance_are_reported_as_no_better_than_the_prior():
    _, report = fit_classifier(by_chance(160), heads=H, classes=C, epochs=15)
    assert not report.better_than_prior
    assert report.words().startswith("no better than prior")


def test_equal_prompts_are_never_on_both_sides_and_no_row_is_repeated():
    examples = separable(40)
    twins = [PromptExample(e.keys, e.values, e.label, e.prompt) for e in examples[:15]]
    _, report = fit_classifier([*examples, *twins], heads=H, classes=C, epochs=1)
    assert report.train + report.validation + report.test == 55
    assert sum(report.counts) == 55
    _, alone = fit_classifier(examples, heads=H, classes=C, epochs=1)
    assert (alone.train, alone.validation, alone.test) == (28, 6, 6)


def test_the_prior_is_that_of_the_training_prompts_by_hand():
    examples = [example(n, 0, torch.randn(4, D)) for n in range(40)]  # one class only
    _, report = fit_classifier(examples, heads=H, classes=C, epochs=1)
    assert report.prior_nats == pytest.approx(-math.log((34 + 1) / (34 + C)))
    assert report.prior_accuracy == 1.0


def test_training_is_repeatable_and_leaves_the_random_state_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, _ = fit_classifier(separable(40), heads=H, classes=C, epochs=3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second, _ = fit_classifier(separable(40), heads=H, classes=C, epochs=3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_too_few_prompts_and_labels_that_are_no_class_are_refused():
    with pytest.raises(ValueError, match="19 different prompts are too few"):
        fit_classifier(separable(19), heads=H, classes=C)
    with pytest.raises(ValueError, match="label 3: classes are 0 to 2"):
        fit_classifier(separable(40), heads=H, classes=3)
