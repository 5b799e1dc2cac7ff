"""One step from a noise level down to a lower one, of images that keep their scale (x + sigma e, x in [-1, 1])."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["VARIANCES", "ddim_step", "ddpm_step", "ddpm_variance"]

VARIANCES = ("posterior", "fixedlarge")
"""Choices of the variance of a DDPM step: that of the posterior, and beta (Ho et al. 2020, section 3.2)."""


def ddpm_step(
    noisy: Tensor, clean: Tensor, high: float, low: float, noise: Tensor, *, variance: str = "posterior"
) -> Tensor:
    """One ancestral step of a DDPM (Ho et al. 2020, arXiv 2006.11239, eq. 7 and 11).

    Args:
        noisy: [M, C, H, W], images at noise level ``high``.
        clean: [M, C, H, W], the denoiser's output there, clipped or not.
        high: noise level before the step, above 0.
        low: noise level after the step, below ``high``; 0 gives ``clean``.
        noise: [M, C, H, W], unit.
        variance: one of ``VARIANCES``.

    Returns:
        [M, C, H, W], images at noise level ``low``.
    """
    if not low:
        return clean
    return clean + (low / high) ** 2 * (noisy - clean) + math.sqrt(ddpm_variance(high, low, variance)) * noise


def ddpm_variance(high: float, low: float, variance: str) -> float:
    """Variance of the noise that a DDPM step from level ``high`` to ``low`` adds."""
    if variance == "posterior":
        return (low / high) ** 2 * (high**2 - low**2)
    return (high**2 - low**2) * (1 + low**2) / (1 + high**2)


def ddim_step(noisy: Tensor, clean: Tensor, high: float, low: float, noise: Tensor, *, eta: float = 0.0) -> Tensor:
    """One step of DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12); arguments and result as for ``ddpm_step``.

    Args:
        eta: share of the posterior's standard deviation; 0 is an Euler step of the ODE, 1 a DDPM step.
    """
    added = eta * math.sqrt(ddpm_variance(high, low, "posterior"))
    return clean + math.sqrt(low**2 - added**2) / high * (noisy - clean) + added * noise
