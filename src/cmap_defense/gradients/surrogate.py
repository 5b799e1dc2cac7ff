"""The derivative of another purification in place of this one's: noise, then denoise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import Tensor

from cmap_defense.common.rng import derived_seeds, draw_latents
from cmap_defense.common.settings import setting
from cmap_defense.errors import GradientError
from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.results import PurificationResult

RHO, SIGMA_MIN = 7.0, 0.002
"""Of the schedule of noise levels (Karras et al. 2022, arXiv 2206.00364, eq. 5); f is the identity at the latter."""

STREAM = 0x5EED
"""Makes the surrogate's noise independent of the noise of the latents, which is drawn from the same seeds."""


@dataclasses.dataclass(frozen=True)
class Surrogate(GradientMode):
    """The values are the purifier's; the derivative is that of noising to ``sigma`` and denoising in ``steps`` steps.

    It is what the attacks of the CMAP paper differentiate (one step from level 5 of an 18-level Karras schedule,
    sigma = 0.1395), and, with more steps, what Lee and Kim 2023 (arXiv 2303.09051) do for diffusion purifiers. Each of
    the K images has noise of its own.

    Cost: ``steps`` forward passes of the backbone per latent, as many again and as many backward passes in the backward
    pass. Not the gradient of the defence: an approximation that ignores what the purifier does.

    Args:
        sigma: noise level, in units of images in [-1, 1], 0.002 at least and within what the backbone was trained for.
        steps: consistency steps: 1 denoises at once; more go down a Karras schedule from ``sigma``, adding fresh noise
            before each.

    Raises:
        SettingsError: a value is out of its range.
    """

    differentiates_defence = False
    needs_denoise = True

    sigma: float = setting(0.1395, minimum=SIGMA_MIN)
    steps: int = setting(1, minimum=1)

    def purify(self, purification: Purification) -> PurificationResult:
        result = purification.run()
        if not purification.wants_gradient:
            return result
        if purification.denoise is None:
            raise GradientError(
                f"{self!r} needs a backbone with denoise(noisy, sigma), which this one lacks. "
                "Use Unrolled() or StraightThrough()."
            )
        images = purification.images
        count, seeds = result.images.shape[1], derived_seeds(purification.seeds, STREAM)
        noise = draw_latents(seeds, count * self.steps, images.shape[1:]).to(images)
        denoised = surrogate_images(purification.denoise, images, noise.unflatten(1, (count, self.steps)), self.sigma)
        return dataclasses.replace(
            result, images=result.images + (denoised - denoised.detach()).to(result.images.dtype)
        )


def surrogate_images(denoise: Callable[[Tensor, float], Tensor], images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Noise, denoise, as often as there is noise for; differentiable.

    Args:
        denoise: the consistency function, of [B, K, C, H, W] and a noise level.
        images: [B, C, H, W] in [0, 1].
        noise: [B, K, steps, C, H, W], unit.
        sigma: the first noise level.

    Returns:
        [B, K, C, H, W] in [0, 1], clipped.
    """
    current = (2 * images - 1)[:, None].expand(-1, noise.shape[1], -1, -1, -1)
    steps = noise.shape[2]
    for step in range(steps):
        root = sigma ** (1 / RHO) + step / steps * (SIGMA_MIN ** (1 / RHO) - sigma ** (1 / RHO))
        level = root**RHO
        added = level if step == 0 else math.sqrt(level**2 - SIGMA_MIN**2)
        noisy = current + added * noise[:, :, step]
        current = denoise(noisy, level).clamp(-1, 1)
    return (current + 1) / 2
