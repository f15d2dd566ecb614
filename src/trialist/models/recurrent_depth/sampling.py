"""The randomness of recurrent depth as functions of keys: steps of a training pass, and the initial state.

Nothing here reads or moves a global generator, so a pass repeated with the same key, in whatever batch, chunk or process,
draws the same numbers.

B batch, T time, d hidden size
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
CUT = 3.0
"""Standard deviations at which the normal distribution of s_0 is cut off, on either side"""


def sample_recurrence(
    seed: int, index: int, mean: float, sigma: float = 0.5, distribution: str = "poisson_lognormal"
) -> int:
    """Number of steps of training pass `index`, at least 1 (arXiv 2502.05171, section 3.3).

    poisson_lognormal: tau ~ N(log mean - sigma^2 / 2, sigma), r ~ Poisson(e^tau) + 1, so that E[r] = mean + 1.
    uniform: 1 to 2 mean - 1.  fixed: mean.
    """
    if distribution == "fixed":
        return round(mean)
    generator = np.random.default_rng([seed, index])
    if distribution == "uniform":
        return int(generator.integers(1, 2 * round(mean)))
    tau = generator.normal(math.log(mean) - sigma**2 / 2, sigma)
    return int(generator.poisson(math.exp(tau))) + 1


def expected_steps(
    mean: float, sigma: float, distribution: str, backprop_depth: int
) -> tuple[float, float]:  # (E[r], E[min(r, k)])
    """Expected number of steps of a training pass, and of those among the last k = `backprop_depth`."""
    k = backprop_depth
    if distribution == "fixed":
        return round(mean), min(round(mean), k)
    if distribution == "uniform":
        steps = np.arange(1, 2 * round(mean))
        return float(steps.mean()), float(np.minimum(steps, k).mean())
    # E[min(r, k)] = sum over j = 1..k of P(r >= j), and P(Poisson(rate) >= n) is the regularised gamma function of (n, rate)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    rates = torch.from_numpy(np.exp(math.log(mean) - sigma**2 / 2 + sigma * nodes))  # (80,)
    orders = torch.arange(1, k, dtype=torch.float64)[:, None]  # (k - 1, 1)
    tails = torch.special.gammainc(orders, rates.expand(k - 1, -1))  # (k - 1, 80)
    inside = float((tails @ torch.from_numpy(weights / weights.sum())).sum()) if k > 1 else 0.0
    return mean + 1.0, 1.0 + inside


def counter_normal(
    key: tuple[int, ...], positions: Tensor, width: int, std: float, rows: Tensor | None = None
) -> Tensor:
    """Normal numbers of standard deviation `std`, cut off at three of it, `(*positions.shape, width)` in float32.

    Every number is a hash of (key, its position, its channel) and, with `rows` (shaped to broadcast over `positions`), its
    row: it does not depend on what else is drawn beside it, nor on the device (up to the last bits).
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    place = _mix((positions.long() + low) & MASK)
    if rows is not None:
        place = _mix((place + rows.long() * 0x9E3779B1 + high) & MASK)
    channels = torch.arange(width, device=positions.device) * 0x85EBCA6B + high
    bits = _mix((_mix(place)[..., None] + channels) & MASK)  # (..., width)
    uniform = ((bits >> 8).float() + 0.5) * 2.0**-24  # in (0, 1), exact in float32
    inside = math.erf(CUT / math.sqrt(2))  # erf of the cut: the share of the normal distribution that is kept
    return torch.erfinv((2.0 * uniform - 1.0) * inside).clamp_(-CUT / math.sqrt(2), CUT / math.sqrt(2)) * (
        std * math.sqrt(2)
    )


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, in which every bit of x reaches every bit of the result."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & MASK
    return x ^ (x >> 15)
