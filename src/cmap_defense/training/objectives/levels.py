"""Noise levels by inverting their distributions: functions of uniform numbers in (0, 1)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange, karras_levels
from cmap_defense.errors import SettingsError


def lognormal_levels(uniform: Tensor, mean: float, std: float, noise: NoiseRange) -> Tensor:
    """Levels sigma with ln sigma ~ N(mean, std^2), clamped to the noise range (arXiv 2206.00364, Table 1).

    Returns:
        [B] in float32, slightly above sigma_min and at most sigma_max.
    """
    log_sigma = mean + std * torch.special.ndtri(uniform.double())
    return log_sigma.exp().clamp(noise.sigma_min * (1 + 1e-3), noise.sigma_max).float()


def uniform_index(uniform: Tensor, count: int) -> Tensor:
    """[B] integers from 0 to count - 1, all equally likely, from uniform numbers [B] in (0, 1)."""
    return (uniform.double() * count).long().clamp_max(count - 1)


def lognormal_index(uniform: Tensor, count: int, noise: NoiseRange, *, rho: float, mean: float, std: float) -> Tensor:
    """Intervals i between Karras levels, as likely as ln sigma ~ N(mean, std^2) is in them (arXiv 2310.14189, Table 1):

    p(i) ~ erf((ln sigma_i+1 - mean) / (sqrt 2 std)) - erf((ln sigma_i - mean) / (sqrt 2 std)).

    Returns:
        [B] integers from 0 to count - 2.
    """
    reached = _reached(count, noise, rho, mean, std, uniform.device)
    return torch.searchsorted(reached, uniform.double().contiguous(), right=True)


def adjacent_levels(index: Tensor, count: int, noise: NoiseRange, rho: float) -> tuple[Tensor, Tensor]:
    """t_n+1 and t_n, each [B] in float32, of ``count`` Karras levels t_1 = sigma_min to t_count = sigma_max."""
    levels = _levels(count, noise, rho, index.device)
    return levels[index + 1], levels[index]


@functools.lru_cache(maxsize=8)
def _levels(count: int, noise: NoiseRange, rho: float, device: torch.device) -> Tensor:
    """Cached, so that not every step waits for a copy to the device."""
    return torch.tensor(karras_levels(count, noise, rho=rho), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=8)
def _reached(count: int, noise: NoiseRange, rho: float, mean: float, std: float, device: torch.device) -> Tensor:
    """Probability of the intervals below each inner level, float64, cached as the levels are."""
    levels = karras_levels(count, noise, rho=rho)
    below = torch.erf((torch.tensor(levels, dtype=torch.float64).log() - mean) / (2**0.5 * std))
    if not below[-1] > below[0]:
        raise SettingsError(
            f"ln sigma ~ N({mean:g}, {std:g}^2) never falls between the noise levels {levels[0]:g} and {levels[-1]:g}: "
            "choose another sigma_mean or a larger sigma_std."
        )
    return ((below - below[0]) / (below[-1] - below[0]))[1:-1].to(device)
