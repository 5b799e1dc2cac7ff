"""Variance-preserving (VP) noise levels, as DiffPure, GDMP and GNSP count them, and the same levels as EDM has them.

A VP diffusion (Ho et al. 2020, arXiv 2006.11239; Song et al. 2021, arXiv 2011.13456) shrinks an image while it adds
noise: x_VP = s (x + sigma e). The denoisers here see x + sigma e (Karras et al. 2022, arXiv 2206.00364), for images in
[-1, 1]. With abar = prod (1 - beta) over the first t of 1000 steps, beta from 1e-4 to 0.02:

    sigma = sqrt((1 - abar) / abar),    s = sqrt(abar) = 1 / sqrt(1 + sigma^2),    score_VP = (D - x) / (sigma^2 s)

In continuous time, t from 0 to 1, beta(t) = 0.1 + 19.9 t and abar(t) = exp(-9.95 t^2 - 0.1 t).
"""

from __future__ import annotations

import functools
import math

import numpy as np

from cmap_defense.common.settings import require_integer

__all__ = ["TOTAL", "vp_beta", "vp_scale", "vp_sigma", "vp_sigma_at", "vp_time"]

TOTAL = 1000
"""Noise levels of the discrete diffusion."""


def vp_sigma(t: int) -> float:
    """The noise level, in units of images in [-1, 1], of t of the 1000 levels of a VP diffusion.

    Args:
        t: 0 to 1000, counted from 1 as the papers do. Index i of their codes is t = i + 1.

    Returns:
        sigma = sqrt((1 - abar) / abar) (Karras et al. 2022, arXiv 2206.00364, Tab. 1), the level that ``OneStep``
        takes; 0 for t = 0.

    Raises:
        SettingsError: t is no integer from 0 to 1000.
    """
    return _sigmas()[require_integer("vp_sigma", "t", t, minimum=0, below=TOTAL + 1)]


def vp_scale(sigma: float) -> float:
    """The factor s by which a VP diffusion has multiplied the image at noise level sigma."""
    return 1 / math.sqrt(1 + sigma**2)


def vp_time(sigma: float) -> float:
    """The continuous time, 0 to 1, at which the noise level is sigma."""
    return (-0.1 + math.sqrt(0.01 + 39.8 * math.log1p(sigma**2))) / 19.9


def vp_sigma_at(time: float) -> float:
    """sigma at a continuous time, 0 to 1: the inverse of ``vp_time``."""
    return math.sqrt(math.expm1(9.95 * time**2 + 0.1 * time))


def vp_beta(time: float) -> float:
    """beta at a continuous time, 0 to 1."""
    return 0.1 + 19.9 * time


@functools.cache
def _sigmas() -> tuple[float, ...]:
    kept = np.cumprod(1 - np.linspace(1e-4, 2e-2, TOTAL))
    return (0.0, *np.sqrt((1 - kept) / kept).tolist())
