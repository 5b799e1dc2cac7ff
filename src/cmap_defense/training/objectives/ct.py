"""Consistency training as first published (Song et al. 2023, arXiv 2303.01469, Algorithm 3, appendix C)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.common.settings import check_fields, require_integer, setting
from cmap_defense.training.objectives import base
from cmap_defense.training.objectives.base import Batch, Denoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class CT(base.NamedDistance):
    """Consistency training; the defaults are the paper's for ImageNet 64 x 64 but for the distance.

    Pairs of neighbours among Karras levels that grow denser, and a target that is a running average.

    The paper's constants (Table 3 there), all with LPIPS: CIFAR-10 s_0 2, s_1 150, mu_0 0.9, batch 512, learning rate
    4e-4; ImageNet 64 x 64 s_0 2, s_1 200, mu_0 0.95, batch 2048, learning rate 8e-6. CMAP's model of ImageNet-100
    (arXiv 2412.08394): LPIPS, mu_0 0.95, batch 1024, learning rate 1e-5.

    Attributes:
        levels_start: s_0, the number of noise levels at the start.
        levels_end: s_1; there are s_1 + 1 noise levels at the end.
        decay_start: mu_0, the decay of the target's running average at the start.
        rho: exponent of the Karras levels (arXiv 2206.00364, eq. 5).
        distance: "l2" (squared), "l1", or "lpips", which needs the extra ``[train]`` and the weights of VGG16.
        lpips: the distance "lpips"; None for LPIPS with the published network. It is no setting.

    Raises:
        MissingExtraError, BackboneFileError: LPIPS cannot be made.
    """

    name: ClassVar[str] = "ct"
    kind: ClassVar[str] = "consistency"

    levels_start: int = setting(2, minimum=2)
    levels_end: int = setting(200, minimum=2)
    decay_start: float = setting(0.95, above=0.0, below=1.0)
    rho: float = setting(7.0, above=0.0)
    distance: str = setting("l2", choices=("l2", "l1", "lpips"))

    def __post_init__(self) -> None:
        check_fields(self)  # before LPIPS is loaded
        require_integer("CT", "levels_end", self.levels_end, minimum=self.levels_start)
        super().__post_init__()

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        count = self.level_count(batch.progress)
        t, r = base.adjacent_levels(base.uniform_index(batch.uniform, count - 1), count, noise, self.rho)
        return base.consistency_loss(model, target, batch.images, batch.z, t, r, distance=self._distance)

    def level_count(self, progress: float) -> int:
        """N(k) = ceil(sqrt(k/K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1, with k/K the ``progress`` (appendix C)."""
        first, last = self.levels_start**2, (self.levels_end + 1) ** 2
        return math.ceil(math.sqrt(progress * (last - first) + first) - 1) + 1

    def decay_at(self, progress: float) -> float:
        """mu(k) = exp(s_0 ln mu_0 / N(k)), with k/K the ``progress`` (appendix C).

        The authors' code divides by N(k) - 1, so that its mu is a little smaller.
        """
        return math.exp(self.levels_start * math.log(self.decay_start) / self.level_count(progress))
