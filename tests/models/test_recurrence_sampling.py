from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from trialist.models.recurrent_depth.sampling import counter_normal, expected_steps, sample_recurrence


def test_lognormal_poisson_steps_have_the_mean_and_spread_of_the_closed_form() -> None:
    mean, sigma, count = 32, 0.5, 100_000
    steps = np.array([sample_recurrence(3, index, mean, sigma) for index in range(count)])
    variance = mean + mean**2 * (math.exp(sigma**2) - 1)  # of a Poisson number whose rate is log-normal
    assert steps.mean() == pytest.approx(mean + 1, abs=4 * math.sqrt(variance / count))
    assert steps.std() == pytest.approx(math.sqrt(variance), rel=0.03)
    assert np.median(steps) == pytest.approx(29, abs=1)
    assert steps.min() >= 1


def test_small_means_still_run_the_core_at_least_once() -> None:
    assert min(sample_recurrence(0, index, 1, 0.5) for index in range(500)) == 1


def test_uniform_steps_cover_one_to_twice_the_mean_minus_one() -> None:
    steps = {sample_recurrence(1, index, 4, distribution="uniform") for index in range(300)}
    assert steps == set(range(1, 8))


def test_steps_are_a_function_of_seed_and_index() -> None:
    first = [sample_recurrence(7, index, 9) for index in range(20)]
    assert first == [sample_recurrence(7, index, 9) for index in range(20)]
    assert first != [sample_recurrence(8, index, 9) for index in range(20)]


@pytest.mark.parametrize(
    ("mean", "sigma", "distribution", "k"),
    [(6, 0.5, "poisson_lognormal", 4), (32, 0.5, "poisson_lognormal", 8), (5, 0.3, "uniform", 3), (7, 0.5, "fixed", 4),
     (6, 0.5, "poisson_lognormal", 1)],
)  # fmt: skip
def test_expected_steps_equal_the_average_over_draws(mean: int, sigma: float, distribution: str, k: int) -> None:
    steps = np.array([sample_recurrence(5, index, mean, sigma, distribution) for index in range(20_000)])
    whole, trained = expected_steps(mean, sigma, distribution, k)
    assert whole == pytest.approx(steps.mean(), rel=0.02)
    assert trained == pytest.approx(np.minimum(steps, k).mean(), rel=0.02)


def test_noise_is_a_normal_distribution_cut_off_at_three_standard_deviations() -> None:
    noise = counter_normal((4, 0), torch.arange(3000), 40, std=0.7)
    assert noise.abs().max() <= 3 * 0.7
    sample = noise.flatten()[::7].double().numpy()
    assert stats.kstest(sample, stats.truncnorm(-3, 3, scale=0.7).cdf).pvalue > 0.01


def test_noise_of_different_positions_channels_rows_and_keys_is_uncorrelated() -> None:
    positions = torch.arange(2000)
    noise = counter_normal((4, 0), positions, 24, std=1.0)
    grid = np.corrcoef(torch.cat([noise, noise.roll(1, 0)], 1).T.numpy())
    others = grid[~np.eye(48, dtype=bool)]
    assert np.abs(others).max() < 5 / math.sqrt(2000)
    rows = counter_normal((4, 0), positions[None], 24, 1.0, torch.arange(2)[:, None])
    for other in (rows[0], rows[1], counter_normal((4, 1), positions, 24, 1.0)):
        assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 5 / math.sqrt(noise.numel())
    assert abs(np.corrcoef(rows[0].flatten(), rows[1].flatten())[0, 1]) < 5 / math.sqrt(noise.numel())


def test_noise_of_a_position_does_not_depend_on_its_neighbours() -> None:
    together = counter_normal((1, 2), torch.arange(9), 5, 1.0)
    assert torch.equal(together[4:6], counter_normal((1, 2), torch.tensor([4, 5]), 5, 1.0))
    assert torch.equal(together[:, :3], counter_normal((1, 2), torch.arange(9), 3, 1.0))
