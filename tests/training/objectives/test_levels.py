"""Noise levels are their distributions' inverses at the uniform numbers that were drawn."""

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from cmap_defense.backbones import NoiseRange
from cmap_defense.backbones.karras import karras_levels
from cmap_defense.errors import SettingsError
from cmap_defense.training.objectives.base import adjacent_levels, lognormal_index, lognormal_levels, uniform_index

NOISE = NoiseRange()


def strata(count: int) -> Tensor:
    """The middles of ``count`` equal parts of (0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def interval_probabilities(levels: list[float], mean: float, std: float) -> list[float]:
    """The table of arXiv 2310.14189, number by number."""
    erf = [math.erf((math.log(level) - mean) / (math.sqrt(2) * std)) for level in levels]
    masses = [b - a for a, b in itertools.pairwise(erf)]
    return [mass / math.fsum(masses) for mass in masses]


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.8, 2.2), (0.5, 0.3)])
def test_lognormal_levels_are_quantiles(mean: float, std: float) -> None:
    uniform = torch.tensor([0.03, 0.2, 0.5, 0.7, 0.98], dtype=torch.float64)
    normal = statistics.NormalDist(mean, std)
    expected = [math.exp(normal.inv_cdf(u)) for u in uniform.tolist()]
    assert lognormal_levels(uniform, mean, std, NOISE).tolist() == pytest.approx(expected, rel=1e-6)


def test_lognormal_levels_stay_in_the_noise_range() -> None:
    levels = lognormal_levels(strata(200), -1.0, 50.0, NOISE)
    assert levels.max() == NOISE.sigma_max
    assert levels.min() == pytest.approx(NOISE.sigma_min * 1.001, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 199])
def test_uniform_indices_are_equally_frequent(count: int) -> None:
    index = uniform_index(strata(11 * count), count)
    assert torch.bincount(index, minlength=count).tolist() == [11] * count


@pytest.mark.parametrize(("count", "mean", "std"), [(2, -1.1, 2.0), (11, -1.1, 2.0), (41, 0.3, 0.7), (1281, -1.1, 2.0)])
def test_intervals_come_as_often_as_their_table_says(count: int, mean: float, std: float) -> None:
    """Of n evenly spread uniform numbers, n p fall into an interval, rounded one way or the other at both ends."""
    levels, n = karras_levels(count, NOISE), 200_000
    found = torch.bincount(lognormal_index(strata(n), count, NOISE, rho=7.0, mean=mean, std=std), minlength=count - 1)
    assert len(found) == count - 1
    expected = n * torch.tensor(interval_probabilities(levels, mean, std), dtype=torch.float64)
    assert (found - expected).abs().max() <= 1.0


def test_intervals_without_any_probability_never_come() -> None:
    levels = karras_levels(30, NOISE)
    index = lognormal_index(strata(1000), 30, NOISE, rho=7.0, mean=0.0, std=0.02)
    possible = [i for i, p in enumerate(interval_probabilities(levels, 0.0, 0.02)) if p > 0]
    assert set(index.tolist()) <= set(possible)
    assert 0 < len(possible) < 29


def test_a_distribution_outside_of_the_levels_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"N\(20, 0.5\^2\) never falls between the noise levels 0.002 and 80"):
        lognormal_index(strata(4), 5, NOISE, rho=7.0, mean=20.0, std=0.5)


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_adjacent_levels_are_neighbours_of_the_table(rho: float) -> None:
    count, noise = 6, NoiseRange(sigma_min=0.01, sigma_max=5.0)
    low, high = 0.01 ** (1 / rho), 5.0 ** (1 / rho)
    table = [(low + i / 5 * (high - low)) ** rho for i in range(6)]
    t, r = adjacent_levels(torch.tensor([4, 0, 2]), count, noise, rho)
    assert t.tolist() == pytest.approx([table[5], table[1], table[3]], rel=1e-6)
    assert r.tolist() == pytest.approx([table[4], table[0], table[2]], rel=1e-6)
    assert t.dtype == r.dtype == torch.float32
    assert t[0] == torch.tensor(5.0)
    assert r[1] == torch.tensor(0.01)
