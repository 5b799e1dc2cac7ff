"""Training of a denoiser D(x, sigma), that of Karras et al. 2022 (arXiv 2206.00364): what is distilled,
and what consistency tuning starts from."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.settings import Settings, require_number
from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.distances import squared_l2
from cmap_defense.training.objectives.levels import lognormal_levels
from cmap_defense.training.objectives.pairs import noisy_images

__all__ = ["EDM", "EDMSettings", "edm_loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMSettings(Settings):
    """Training of a denoiser; the defaults are those of the paper (arXiv 2206.00364, Table 1).

    sigma_mean, sigma_std: P_mean and P_std of ln sigma, a normal distribution, then clamped to the noise range.
    """

    sigma_mean: float = -1.2
    sigma_std: float = 1.2

    def __post_init__(self) -> None:
        require_number("EDMSettings", "sigma_mean", self.sigma_mean)
        require_number("EDMSettings", "sigma_std", self.sigma_std, above=0.0)


class EDM(Objective):
    """The squared error of the denoised image, weighted so that the network's own errors count alike at all levels."""

    name = "edm"
    kind = "denoiser"

    def __init__(self, settings: EDMSettings | None = None) -> None:
        self.settings = settings or EDMSettings()

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        sigma = lognormal_levels(batch.uniform, self.settings.sigma_mean, self.settings.sigma_std, noise)
        return edm_loss(model, batch.images, batch.z, sigma, sigma_data=noise.sigma_data)


def edm_loss(model: Denoise, images: Tensor, z: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """lambda(sigma) ||D(x + n, sigma) - x||^2 per image, [B]; arXiv 2206.00364, eq. 2 and 8.

    The noise is n = sigma z, the weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, 1 / c_out^2 (Table 1).

    images, z: [B, C, H, W]. sigma: [B].
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * squared_l2(model(noisy_images(images, z, sigma), sigma), images)
