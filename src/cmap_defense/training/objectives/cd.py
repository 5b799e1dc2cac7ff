"""Consistency distillation: a consistency model of a denoiser (Song et al. 2023, arXiv 2303.01469, Algorithm 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError
from cmap_defense.training.objectives.base import (
    Batch,
    Denoise,
    Objective,
    adjacent_levels,
    consistency_pair,
    noisy_images,
    uniform_index,
)
from cmap_defense.training.objectives.distances import Distance, distance_named


@dataclasses.dataclass(frozen=True, kw_only=True)
class CD(Objective):
    """Consistency distillation; the defaults are the paper's for CIFAR-10 but for the distance.

    Pairs of neighbours along the trajectories of a teacher, which takes one Heun step from the upper to the lower.

    The paper's constants (Table 3 there), all with LPIPS: CIFAR-10 N 18, mu 0, batch 512, learning rate 4e-4; ImageNet
    64 x 64 N 40, mu 0.95, batch 2048, learning rate 8e-6.

    Attributes:
        levels: N, the number of Karras levels.
        rho: their exponent (arXiv 2206.00364, eq. 5).
        distance: "l2" (squared), "l1", "pseudo-huber", or "lpips", which needs the extra ``[train]`` and the weights
            of VGG16.
        huber: c of the Pseudo-Huber distance between whole images; None for 0.00054 sqrt(C H W).
        target_decay: mu of the target's running average, below 1; None for the model itself as target (mu = 0).
        teacher: the denoiser D of Karras et al. 2022 (``EDMDenoiser.denoise``), in eval mode, on the device of the
            trained model; called without gradients. It and the following are no settings.
        teacher_source: for records and checkpoints: "name", and "kind" and "weights_sha256" where they are known.
        class_conditional: whether the teacher takes ``class_labels``; the trained model must be class-conditional too.
        lpips: the distance "lpips"; None for LPIPS with the published network.

    Raises:
        MissingExtraError, BackboneFileError: LPIPS cannot be made.
    """

    name: ClassVar[str] = "cd"
    kind: ClassVar[str] = "consistency"

    levels: int = setting(18, minimum=2)
    rho: float = setting(7.0, above=0.0)
    distance: str = setting("l2", choices=("l2", "l1", "pseudo-huber", "lpips"))
    huber: float | None = setting(None, above=0.0)
    target_decay: float | None = setting(None, minimum=0.0, below=1.0)
    teacher: Callable[..., Tensor] = dataclasses.field(repr=False, compare=False)
    teacher_source: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)
    class_conditional: bool = dataclasses.field(default=False, repr=False, compare=False)
    lpips: Distance | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.huber is not None and self.distance != "pseudo-huber":
            raise SettingsError(
                f"CD.huber belongs to the distance 'pseudo-huber', but the distance is {self.distance!r}."
            )
        assert callable(self._distance)  # or it would fail at the first step

    @functools.cached_property
    def _distance(self) -> Distance:
        return distance_named(self.distance, huber=self.huber, lpips=self.lpips)

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        index = uniform_index(batch.uniform, self.levels - 1)
        t, r = adjacent_levels(index, self.levels, noise, self.rho)
        teacher = self.teacher
        if self.class_conditional:
            teacher = functools.partial(teacher, class_labels=batch.labels)
        return cd_loss(model, target, teacher, batch.images, batch.z, t, r, distance=self._distance)

    def decay_at(self, progress: float) -> float | None:
        return self.target_decay

    @property
    def sources(self) -> Mapping[str, Mapping[str, Any]]:
        return {"teacher": self.teacher_source}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "teacher": self.teacher_source["name"]}


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
    """d(f(x_t, t), f^-(x'_r, r)) per image, [B]; arXiv 2303.01469, eq. 7, with lambda = 1.

    Args:
        model: f, at x_t = x + t z.
        target: f^-, at x'_r, without a gradient.
        teacher: the denoiser whose Heun step goes from x_t to x'_r (eq. 6).
        images: clean images x, [B, C, H, W].
        z: unit normal noise, [B, C, H, W].
        t: t_n+1, [B].
        r: t_n, [B].
        distance: d.
    """
    noisy = noisy_images(images, z, t)
    with torch.no_grad():
        less_noisy = heun_step(teacher, noisy, t, r)
    return distance(*consistency_pair(model, target, noisy, t, less_noisy, r))


def heun_step(denoise: Denoise, noisy: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """One step of Heun's method along the flow dx/dt = (x - D(x, t)) / t; arXiv 2206.00364, Algorithm 1.

    Args:
        denoise: the denoiser D.
        noisy: x_t, [B, C, H, W].
        t: noise levels of x_t, [B], above 0.
        r: noise levels to go to, [B], above 0; below t when images are made.

    Returns:
        x_r, [B, C, H, W].
    """
    level = (slice(None), None, None, None)
    step = (r - t)[level]
    slope = (noisy - denoise(noisy, t)) / t[level]
    euler = noisy + step * slope
    slope_there = (euler - denoise(euler, r)) / r[level]
    return noisy + step * (slope + slope_there) / 2
