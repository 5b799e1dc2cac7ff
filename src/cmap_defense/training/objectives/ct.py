"""Consistency training as it was first published (Song et al. 2023, arXiv 2303.01469, Algorithm 3, appendix C)."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.settings import Settings, require_choice, require_integer, require_number
from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.distances import Distance, distance_named
from cmap_defense.training.objectives.levels import adjacent_levels, uniform_index
from cmap_defense.training.objectives.pairs import consistency_pair, noisy_images

__all__ = ["CT", "CTSettings", "ct_decay", "ct_level_count", "ct_loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTSettings(Settings):
    """Consistency training; the defaults are the paper's for ImageNet 64 x 64 but for the distance.

    levels_start, levels_end: s_0 and s_1 of the number of noise levels, which grows from s_0 to s_1 + 1.
    decay_start: mu_0 of the target's running average.
    rho: of the Karras levels (arXiv 2206.00364, eq. 5).
    distance: "l2", squared; "l1"; or "lpips", which needs the extra ``[train]`` and the weights of VGG16.

    The paper's constants (Table 3 there), all with LPIPS: CIFAR-10 s_0 2, s_1 150, mu_0 0.9, batch 512, learning rate
    4e-4; ImageNet 64 x 64 s_0 2, s_1 200, mu_0 0.95, batch 2048, learning rate 8e-6. CMAP's model of ImageNet-100
    (arXiv 2412.08394): LPIPS, mu_0 0.95, batch 1024, learning rate 1e-5.
    """

    levels_start: int = 2
    levels_end: int = 200
    decay_start: float = 0.95
    rho: float = 7.0
    distance: str = "l2"

    def __post_init__(self) -> None:
        require_integer("CTSettings", "levels_start", self.levels_start, minimum=2)
        require_integer("CTSettings", "levels_end", self.levels_end, minimum=self.levels_start)
        require_number("CTSettings", "decay_start", self.decay_start, above=0.0, below=1.0)
        require_number("CTSettings", "rho", self.rho, above=0.0)
        require_choice("CTSettings", "distance", self.distance, ("l2", "l1", "lpips"))


class CT(Objective):
    """Pairs of neighbours among Karras levels that grow denser, and a target that is a running average.

    Args:
        settings: None for the defaults.
        lpips: what the distance "lpips" is; None for LPIPS with the published network.

    Raises:
        MissingExtraError, BackboneFileError: LPIPS cannot be made.
    """

    name = "ct"
    kind = "consistency"

    def __init__(self, settings: CTSettings | None = None, *, lpips: Distance | None = None) -> None:
        self.settings = settings or CTSettings()
        self.distance = distance_named(self.settings.distance, lpips=lpips)

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        count = ct_level_count(batch.progress, self.settings)
        t, r = adjacent_levels(uniform_index(batch.uniform, count - 1), count, noise, self.settings.rho)
        return ct_loss(model, target, batch.images, batch.z, t, r, distance=self.distance)

    def target_decay(self, progress: float) -> float | None:
        return ct_decay(progress, self.settings)


def ct_loss(
    model: Denoise, target: Denoise, images: Tensor, z: Tensor, t: Tensor, r: Tensor, *, distance: Distance
) -> Tensor:
    """d(f(x + t_n+1 z, t_n+1), f^-(x + t_n z, t_n)) per image, [B], with lambda = 1 and no gradient through the second;
    arXiv 2303.01469, eq. 10.

    images, z: [B, C, H, W]. t, r: [B], t_n+1 and t_n.
    """
    noisy, less_noisy = noisy_images(images, z, t), noisy_images(images, z, r)
    return distance(*consistency_pair(model, target, noisy, t, less_noisy, r))


def ct_level_count(progress: float, settings: CTSettings) -> int:
    """N(k) = ceil(sqrt(k/K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1 at ``progress`` k/K in [0, 1); appendix C there."""
    first, last = settings.levels_start**2, (settings.levels_end + 1) ** 2
    return math.ceil(math.sqrt(progress * (last - first) + first) - 1) + 1


def ct_decay(progress: float, settings: CTSettings) -> float:
    """mu(k) = exp(s_0 ln mu_0 / N(k)) at ``progress`` k/K in [0, 1); appendix C there.

    The authors' code divides by N(k) - 1 instead, so that theirs is a little smaller.
    """
    return math.exp(settings.levels_start * math.log(settings.decay_start) / ct_level_count(progress, settings))
