"""The objective of CMAP: eq. 10, 12 and 9 of arXiv 2412.08394, one value per image.

Norms and SSIM are sums over C x H x W, as in the paper, not means. Shapes: B images, K latents each.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference

TINY_VARIANCE = 1e-20
"""Below this variance the standard deviation is taken as constant: its derivative at 0 does not exist."""


@dataclasses.dataclass(frozen=True)
class ObjectiveTerms:
    """The parts of eq. 9.

    Attributes:
        l1: [B, K], ||G(u_k) - x'||_1 with both in [-1, 1].
        ssim: [B, K], S(G(u_k), x), the sum of the SSIM map, at most C H W.
        latent: [B], L_d (12).
        total: [B], L (9).
    """

    l1: Tensor
    ssim: Tensor
    latent: Tensor
    total: Tensor


def perceptual_terms(
    generated: Tensor, reference: SSIMReference, l1_smoothing: float = 0.0, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The two distances of eq. 10 between generated images and their inputs.

    Args:
        generated: [M, C, H, W] in [-1, 1].
        reference: of the M inputs in [0, 1], one per generated image.
        l1_smoothing: d in sqrt(r^2 + d^2) - d, which takes the place of |r| for each residual r; 0 is the method's L1,
            whose second derivative is zero where it exists.
        tolerance: t of max(|r| - t, 0), which takes the place of |r|; 0 is the method's L1.

    Returns:
        l1 and ssim, [M] each: ||G - x'||_1 and S(G, x).
    """
    residual = generated - (2 * reference.images.to(generated.dtype) - 1)
    residual = (residual.abs() - tolerance).clamp_min(0) if tolerance else residual
    size = (residual.square() + l1_smoothing**2).sqrt() - l1_smoothing if l1_smoothing else residual.abs()
    return size.flatten(1).sum(dim=1), reference.ssim_sum((generated + 1) / 2)


def latent_moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """m and s of eq. 12: mean and unbiased standard deviation [B, C, H, W] over the K latents [B, K, C, H, W].

    For K = 1 there is no standard deviation; s is then 1, the value that the prior requires.
    """
    mean = latents.mean(dim=1)
    if latents.shape[1] == 1:
        return mean, torch.ones_like(mean)
    variance = (latents - mean[:, None]).square().sum(dim=1) / (latents.shape[1] - 1)
    return mean, variance.clamp_min(TINY_VARIANCE).sqrt()


def latent_term(latents: Tensor) -> Tensor:
    """L_d (12) of unit latents [B, K, C, H, W]: ||m||^2 + ||s - 1||^2 per image, [B]."""
    mean, std = latent_moments(latents)
    return mean.square().flatten(1).sum(dim=1) + (std - 1).square().flatten(1).sum(dim=1)


def combine_terms(l1: Tensor, ssim: Tensor, latent: Tensor, settings: CMAPSettings) -> ObjectiveTerms:
    """L = L_a + w_latent L_d (9), with L_a (10) the mean over k of l1 - w_ssim S; l1 and ssim [B, K], latent [B]."""
    perceptual = (l1 - settings.ssim_weight * ssim).mean(dim=1)
    return ObjectiveTerms(l1, ssim, latent, perceptual + settings.latent_weight * latent)
