from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.models.recurrent import recurrent
from trialist.models.recurrent_depth.convert import start_from_identity
from trialist.models.recurrent_depth.health import recurrence_gain, token_correlation
from trialist.models.recurrent_depth.steps import depth_of


def test_token_correlation_is_the_mean_over_pairs_of_real_tokens() -> None:
    states, mask = (
        torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[1] * 4, [0, 1, 1, 1]]),
    )
    pairs = [
        np.corrcoef(states[row, a], states[row, b])[0, 1]
        for row in range(2)
        for a, b in itertools.combinations([t for t in range(4) if mask[row, t]], 2)
    ]
    assert token_correlation(states, mask) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_equal_states_have_correlation_one_and_one_token_has_none() -> None:
    assert token_correlation(torch.randn(1, 1, 8).expand(2, 5, 8)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no row has two real tokens"):
        token_correlation(torch.randn(3, 1, 8))


def test_recurrence_gain_is_the_difference_of_the_losses(decoder) -> None:
    model, ids = recurrent(decoder).train(), torch.randint(3, 37, (2, 9))
    found = recurrence_gain(model, ids)
    assert model.training
    model.eval()
    expected = float(model(ids, labels=ids, num_steps=1).loss - model(ids, labels=ids).loss)
    assert found == pytest.approx(expected, abs=1e-4)
    assert model(ids).num_steps.unique().tolist() == [5]


def test_a_model_that_ignores_its_state_gains_nothing(decoder) -> None:
    model = recurrent(decoder)
    start_from_identity(depth_of(model).core)
    assert recurrence_gain(model, torch.randint(3, 37, (2, 9))) == pytest.approx(0.0, abs=1e-5)


def test_a_gain_at_no_steps_is_refused(decoder) -> None:
    with pytest.raises(ValueError, match="num_steps is 0; it must be a whole number of at least 1"):
        recurrence_gain(recurrent(decoder), torch.randint(3, 37, (2, 9)), num_steps=0)


def test_modules_that_stand_still_stay_so(decoder) -> None:
    model = recurrent(decoder).train()
    depth_of(model).prelude.eval()
    recurrence_gain(model, torch.randint(3, 37, (2, 9)))
    assert not any(module.training for module in depth_of(model).prelude.modules())
    assert depth_of(model).core.training
