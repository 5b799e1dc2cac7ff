"""Consistency training as it was improved (Song and Dhariwal 2023, arXiv 2310.14189, Table 1)."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.settings import Settings, require_integer, require_number
from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.distances import pseudo_huber
from cmap_defense.training.objectives.levels import adjacent_levels, lognormal_index
from cmap_defense.training.objectives.pairs import consistency_pair, noisy_images

__all__ = ["ICT", "ICTSettings", "ict_level_count", "ict_loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICTSettings(Settings):
    """Improved consistency training; the defaults are the paper's (arXiv 2310.14189, Table 1).

    intervals_start, intervals_end: s_0 and s_1, the intervals between neighbouring noise levels, which double in
    number from s_0 to s_1.
    sigma_mean, sigma_std: P_mean and P_std of ln sigma, a normal distribution that tells how often each interval comes.
    rho: of the Karras levels (arXiv 2206.00364, eq. 5).
    huber: c of the Pseudo-Huber distance sqrt(d^2 + c^2) - c between whole images; None for 0.00054 sqrt(C H W).
    """

    intervals_start: int = 10
    intervals_end: int = 1280
    sigma_mean: float = -1.1
    sigma_std: float = 2.0
    rho: float = 7.0
    huber: float | None = None

    def __post_init__(self) -> None:
        require_integer("ICTSettings", "intervals_start", self.intervals_start, minimum=1)
        require_integer("ICTSettings", "intervals_end", self.intervals_end, minimum=self.intervals_start)
        require_number("ICTSettings", "sigma_mean", self.sigma_mean)
        require_number("ICTSettings", "sigma_std", self.sigma_std, above=0.0)
        require_number("ICTSettings", "rho", self.rho, above=0.0)
        if self.huber is not None:
            require_number("ICTSettings", "huber", self.huber, above=0.0)


class ICT(Objective):
    """Pairs of neighbours among Karras levels whose number doubles again and again; the target is the model itself."""

    name = "ict"
    kind = "consistency"

    def __init__(self, settings: ICTSettings | None = None) -> None:
        self.settings = settings or ICTSettings()

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        s = self.settings
        count = ict_level_count(batch.progress, s)
        index = lognormal_index(batch.uniform, count, noise, rho=s.rho, mean=s.sigma_mean, std=s.sigma_std)
        t, r = adjacent_levels(index, count, noise, s.rho)
        return ict_loss(model, target, batch.images, batch.z, t, r, huber=s.huber)


def ict_loss(
    model: Denoise, target: Denoise, images: Tensor, z: Tensor, t: Tensor, r: Tensor, *, huber: float | None
) -> Tensor:
    """d(f(x + t z, t), f(x + r z, r)) / (t - r) per image, [B], no gradient through the second; arXiv 2310.14189,
    eq. 7.

    images, z: [B, C, H, W]. t, r: [B], r below t. huber: c of the Pseudo-Huber distance d; None for
    0.00054 sqrt(C H W).
    """
    noisy, less_noisy = noisy_images(images, z, t), noisy_images(images, z, r)
    return pseudo_huber(*consistency_pair(model, target, noisy, t, less_noisy, r), huber) / (t - r)


def ict_level_count(progress: float, settings: ICTSettings) -> int:
    """N(k) = min(s_0 2^floor(k/K'), s_1) + 1 with K' = K / (log2 floor(s_1/s_0) + 1), at ``progress`` k/K in [0, 1);
    Table 1 there. All stages are equally long; the paper rounds K' down to whole steps."""
    stages = math.log2(settings.intervals_end // settings.intervals_start) + 1
    return min(settings.intervals_start * 2 ** math.floor(progress * stages), settings.intervals_end) + 1
