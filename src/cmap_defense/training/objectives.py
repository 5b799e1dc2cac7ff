"""What a backbone is trained to minimise: small pure functions of (denoise, images, noise, progress).

An objective is called as ``objective(denoise, images, generator, progress, noise_range)`` and returns one loss per
image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.training.settings import ECTSettings

__all__ = ["ECT", "Objective", "ect_previous_level", "ect_stage", "pseudo_huber"]

Denoise = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """One training objective."""

    def __call__(
        self, denoise: Denoise, images: Tensor, generator: torch.Generator, progress: float, noise_range: NoiseRange
    ) -> Tensor:
        """Losses [B] of images [B, C, H, W] in [-1, 1]; ``progress`` in [0, 1) is the part of the training done."""
        ...


class ECT:
    """Consistency training with a gap that halves over training (Geng et al. 2024, arXiv 2406.14548, section 4)."""

    def __init__(self, settings: ECTSettings | None = None) -> None:
        self.settings = settings or ECTSettings()

    def __call__(
        self, denoise: Denoise, images: Tensor, generator: torch.Generator, progress: float, noise_range: NoiseRange
    ) -> Tensor:
        s = self.settings
        log_sigma = s.sigma_mean + s.sigma_std * torch.randn(len(images), generator=generator, device="cpu")
        noise = torch.randn(images.shape, generator=generator, device="cpu")
        t = log_sigma.exp().clamp(noise_range.sigma_min * (1 + 1e-3), noise_range.sigma_max).to(images.device)
        r = ect_previous_level(t, ect_stage(progress, s), s, noise_range.sigma_min)
        z = noise.to(images.device)
        return consistency_loss(denoise, images, z, t, r, huber=s.huber)


def consistency_loss(denoise: Denoise, images: Tensor, z: Tensor, t: Tensor, r: Tensor, *, huber: float) -> Tensor:
    """d(f(x + t z, t), f(x + r z, r)) / (t - r) per image, no gradient through the second; arXiv 2310.14189, eq. 7."""
    level = (slice(None), None, None, None)
    ahead = denoise(images + t[level] * z, t)
    with torch.no_grad():
        target = denoise(images + r[level] * z, r)
    return pseudo_huber(ahead, target, huber) / (t - r)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c over all but the first axis, c above 0; arXiv 2310.14189, eq. 8."""
    difference = a - b
    wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
    square = wide.square().flatten(1).sum(dim=1)
    return square / ((square + c**2).sqrt() + c)  # the same without cancellation


def ect_stage(progress: float, settings: ECTSettings) -> int:
    """The number of halvings of the gap at ``progress`` in [0, 1): equal stages, then the last one for ``settle``."""
    if settings.halvings == 0:
        return 0
    moving = progress / (1 - settings.settle)
    return min(settings.halvings, math.floor(moving * settings.halvings))


def ect_previous_level(t: Tensor, stage: int, settings: ECTSettings, sigma_min: float) -> Tensor:
    """The lower noise level r of the pair (t, r): r = t (1 - 2^-stage (1 + k sigmoid(-b t))), sigma_min at least."""
    gap = (1 + settings.gap_scale * torch.sigmoid(-settings.gap_steepness * t)) / 2**stage
    return (t * (1 - gap)).clamp_min(sigma_min)
