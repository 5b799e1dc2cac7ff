"""Training of a denoiser D(x, sigma) (Karras et al. 2022, arXiv 2206.00364), to distil or to tune for consistency."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.common.settings import setting
from cmap_defense.training.objectives.base import Batch, Denoise, Objective, lognormal_levels, noisy_images
from cmap_defense.training.objectives.distances import squared_l2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(Objective):
    """Training of a denoiser; the defaults are the paper's (arXiv 2206.00364, Table 1).

    The squared error of the denoised image is weighted so that the network's errors count alike at all levels.

    Attributes:
        sigma_mean: P_mean, the mean of the normal distribution of ln sigma, which is clamped to the noise range.
        sigma_std: P_std, its standard deviation.
    """

    name: ClassVar[str] = "edm"
    kind: ClassVar[str] = "denoiser"

    sigma_mean: float = setting(-1.2)
    sigma_std: float = setting(1.2, above=0.0)

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        sigma = lognormal_levels(batch.uniform, self.sigma_mean, self.sigma_std, noise)
        return edm_loss(model, batch.images, batch.z, sigma, sigma_data=noise.sigma_data)


def edm_loss(model: Denoise, images: Tensor, z: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """lambda(sigma) ||D(x + sigma z, sigma) - x||^2 per image, [B]; arXiv 2206.00364, eq. 2 and 8.

    Args:
        model: the denoiser D.
        images: clean images x, [B, C, H, W].
        z: unit normal noise, [B, C, H, W].
        sigma: noise levels, [B].
        sigma_data: standard deviation of the data, in lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2,
            which is 1 / c_out^2 (Table 1).
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * squared_l2(model(noisy_images(images, z, sigma), sigma), images)
