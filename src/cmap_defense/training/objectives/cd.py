"""Consistency distillation: a consistency model of a denoiser (Song et al. 2023, arXiv 2303.01469, Algorithm 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.errors import SettingsError
from cmap_defense.settings import Settings, require_choice, require_integer, require_number
from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.distances import Distance, distance_named
from cmap_defense.training.objectives.levels import adjacent_levels, uniform_index
from cmap_defense.training.objectives.pairs import consistency_pair, noisy_images

__all__ = ["CD", "CDSettings", "cd_loss", "heun_step"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CDSettings(Settings):
    """Consistency distillation; the defaults are the paper's for CIFAR-10 but for the distance.

    levels: N, the number of Karras levels. rho: theirs (arXiv 2206.00364, eq. 5).
    distance: "l2", squared; "l1"; "pseudo-huber"; or "lpips", which needs the extra ``[train]`` and the weights of
    VGG16.
    huber: c of the Pseudo-Huber distance between whole images; None for 0.00054 sqrt(C H W).
    target_decay: mu of the target's running average, below 1; None for the model itself as target, which is mu = 0.

    The paper's constants (Table 3 there), all with LPIPS: CIFAR-10 N 18, mu 0, batch 512, learning rate 4e-4; ImageNet
    64 x 64 N 40, mu 0.95, batch 2048, learning rate 8e-6.
    """

    levels: int = 18
    rho: float = 7.0
    distance: str = "l2"
    huber: float | None = None
    target_decay: float | None = None

    def __post_init__(self) -> None:
        require_integer("CDSettings", "levels", self.levels, minimum=2)
        require_number("CDSettings", "rho", self.rho, above=0.0)
        require_choice("CDSettings", "distance", self.distance, ("l2", "l1", "pseudo-huber", "lpips"))
        if self.huber is not None:
            require_number("CDSettings", "huber", self.huber, above=0.0)
            if self.distance != "pseudo-huber":
                raise SettingsError(
                    f"CDSettings.huber belongs to the distance 'pseudo-huber', but the distance is {self.distance!r}."
                )
        if self.target_decay is not None:
            require_number("CDSettings", "target_decay", self.target_decay, minimum=0.0, below=1.0)


class CD(Objective):
    """Pairs of neighbours along the trajectories of a teacher, which takes one Heun step from the upper to the lower.

    Args:
        settings: None for the defaults.
        teacher: the denoiser D of Karras et al. 2022 (``EDMDenoiser.denoise``), in eval mode, on the device of what is
            trained; called without gradients.
        teacher_name: as in records and checkpoints.
        class_conditional: whether the teacher is told the classes, as ``class_labels``; what is trained must be told
            them too.
        lpips: what the distance "lpips" is; None for LPIPS with the published network.

    Raises:
        MissingExtraError, BackboneFileError: LPIPS cannot be made.
    """

    name = "cd"
    kind = "consistency"

    def __init__(
        self,
        settings: CDSettings | None = None,
        *,
        teacher: Callable[..., Tensor],
        teacher_name: str,
        class_conditional: bool = False,
        lpips: Distance | None = None,
    ) -> None:
        self.settings = settings or CDSettings()
        self.teacher, self.teacher_name, self.class_conditional = teacher, teacher_name, class_conditional
        self.distance = distance_named(self.settings.distance, huber=self.settings.huber, lpips=lpips)

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        s = self.settings
        t, r = adjacent_levels(uniform_index(batch.uniform, s.levels - 1), s.levels, noise, s.rho)
        told = {"class_labels": batch.labels} if self.class_conditional else {}
        teacher = functools.partial(self.teacher, **told)
        return cd_loss(model, target, teacher, batch.images, batch.z, t, r, distance=self.distance)

    def target_decay(self, progress: float) -> float | None:
        return self.settings.target_decay

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "teacher": self.teacher_name}


def cd_loss(
    model: Denoise,
    target: Denoise,
    teacher: Denoise,
    images: Tensor,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    distance: Distance,
) -> Tensor:
    """d(f(x_t, t), f^-(x'_r, r)) per image, [B], with lambda = 1 and no gradient through the second; arXiv 2303.01469,
    eq. 7. x_t = x + t z, and x'_r is the teacher's Heun step from there to r (eq. 6).

    images, z: [B, C, H, W]. t, r: [B], t_n+1 and t_n.
    """
    noisy = noisy_images(images, z, t)
    with torch.no_grad():
        less_noisy = heun_step(teacher, noisy, t, r)
    return distance(*consistency_pair(model, target, noisy, t, less_noisy, r))


def heun_step(denoise: Denoise, noisy: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r [B, C, H, W] of the probability flow dx/dt = (x - D(x, t)) / t through ``noisy``, by one step of Heun's
    second-order method; arXiv 2206.00364, Algorithm 1.

    noisy: x_t, [B, C, H, W]. t, r: [B], above 0; r is below t when images are made.
    """
    level = (slice(None), None, None, None)
    step = (r - t)[level]
    slope = (noisy - denoise(noisy, t)) / t[level]
    euler = noisy + step * slope
    slope_there = (euler - denoise(euler, r)) / r[level]
    return noisy + step * (slope + slope_there) / 2
