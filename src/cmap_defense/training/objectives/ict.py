"""Improved consistency training (Song and Dhariwal 2023, arXiv 2310.14189, Table 1)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.common.settings import require_integer, setting
from cmap_defense.training.objectives import base
from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.distances import pseudo_huber


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICT(Objective):
    """Improved consistency training; the defaults are the paper's (arXiv 2310.14189, Table 1).

    Pairs of neighbours among Karras levels whose number doubles again and again; the target is the model itself.

    Attributes:
        intervals_start: s_0, the number of intervals between neighbouring noise levels at the start.
        intervals_end: s_1, their number at the end.
        sigma_mean: P_mean, the mean of the normal distribution of ln sigma, by which intervals are drawn.
        sigma_std: P_std, its standard deviation.
        rho: exponent of the Karras levels (arXiv 2206.00364, eq. 5).
        huber: c of the Pseudo-Huber distance sqrt(d^2 + c^2) - c between whole images; None for 0.00054 sqrt(C H W).
    """

    name: ClassVar[str] = "ict"
    kind: ClassVar[str] = "consistency"

    intervals_start: int = setting(10, minimum=1)
    intervals_end: int = setting(1280, minimum=1)
    sigma_mean: float = setting(-1.1)
    sigma_std: float = setting(2.0, above=0.0)
    rho: float = setting(7.0, above=0.0)
    huber: float | None = setting(None, above=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("ICT", "intervals_end", self.intervals_end, minimum=self.intervals_start)

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        count = self.level_count(batch.progress)
        law = {"rho": self.rho, "mean": self.sigma_mean, "std": self.sigma_std}
        index = base.lognormal_index(batch.uniform, count, noise, **law)
        t, r = base.adjacent_levels(index, count, noise, self.rho)
        return ict_loss(model, target, batch.images, batch.z, t, r, huber=self.huber)

    def level_count(self, progress: float) -> int:
        """N(k) = min(s_0 2^floor(k/K'), s_1) + 1 with K' = K / (log2 floor(s_1/s_0) + 1) (Table 1 there).

        All stages are equally long; the paper rounds K' down to whole steps. ``progress`` is k/K in [0, 1).
        """
        stages = math.log2(self.intervals_end // self.intervals_start) + 1
        return min(self.intervals_start * 2 ** math.floor(progress * stages), self.intervals_end) + 1


def ict_loss(
    model: Denoise, target: Denoise, images: Tensor, z: Tensor, t: Tensor, r: Tensor, *, huber: float | None
) -> Tensor:
    """d(f(x + t z, t), f(x + r z, r)) / (t - r) per image, [B]; arXiv 2310.14189, eq. 7.

    ``huber`` is c of the Pseudo-Huber distance d, None for 0.00054 sqrt(C H W); the rest is as for
    ``consistency_loss``.
    """
    distance = functools.partial(pseudo_huber, c=huber)
    return base.consistency_loss(model, target, images, z, t, r, distance=distance) / (t - r)
