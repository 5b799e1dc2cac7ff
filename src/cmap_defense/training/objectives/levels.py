"""Noise levels by inverting their distributions: functions of uniform numbers in (0, 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange

__all__ = ["lognormal_levels"]


def lognormal_levels(uniform: Tensor, mean: float, std: float, noise: NoiseRange) -> Tensor:
    """[B] levels sigma in float32 with ln sigma ~ N(mean, std^2) (arXiv 2206.00364, Table 1), a little above sigma_min
    and sigma_max at most. uniform: [B] in (0, 1)."""
    log_sigma = mean + std * torch.special.ndtri(uniform.double())
    return log_sigma.exp().clamp(noise.sigma_min * (1 + 1e-3), noise.sigma_max).float()
