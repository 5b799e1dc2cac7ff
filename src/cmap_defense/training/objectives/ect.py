"""Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548, section 4)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError
from cmap_defense.training.objectives.base import Batch, Denoise, Objective, lognormal_levels
from cmap_defense.training.objectives.ict import ict_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class ECT(Objective):
    """Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548); the defaults are for a training from scratch.

    Pairs of noise levels (t, r) whose gap halves again and again; the first stage is a denoiser. The loss is that of
    improved consistency training, ``ict_loss``.

    A training may start from the weights of a denoiser (``EDM``): the
    scalings of D and f differ by sigma_min alone, and the first stage ends at D. It may continue a consistency model
    too: set ``halved`` to the number of halvings that the earlier training had made when its learning rate was that of
    the new start. At its last number and a higher learning rate the training can diverge.

    Attributes:
        sigma_mean: mean of the normal distribution of ln sigma, which is clamped to the noise range.
        sigma_std: its standard deviation.
        halvings: number of times that the gap between the two noise levels is halved in all; at most 16.
        halved: those of them that came before this training, which starts from the weights of a consistency model.
        settle: fraction of the training that is left to the last stage.
        gap_scale: k of the gap's dependence on sigma, 1 + k sigmoid(-b sigma).
        gap_steepness: b of the same.
        huber: c of the Pseudo-Huber distance sqrt(d^2 + c^2) - c between whole images.

    Raises:
        SettingsError: a value is out of its range, or ``halved`` is above ``halvings``.
    """

    name: ClassVar[str] = "ect"
    kind: ClassVar[str] = "consistency"

    sigma_mean: float = setting(-0.8)
    sigma_std: float = setting(2.2, above=0.0)
    halvings: int = setting(7, minimum=0)
    halved: int = setting(0, minimum=0)
    settle: float = setting(0.25, minimum=0.0, below=1.0)
    gap_scale: float = setting(8.0, minimum=0.0)
    gap_steepness: float = setting(1.0, above=0.0)
    huber: float = setting(0.03, above=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.halvings > 16:
            raise SettingsError(f"ECT.halvings must be at most 16, but is {self.halvings}: the gap would vanish.")
        if self.halved > self.halvings:
            raise SettingsError(f"ECT.halved ({self.halved}) must not be above ECT.halvings ({self.halvings}).")

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        t = lognormal_levels(batch.uniform, self.sigma_mean, self.sigma_std, noise)
        r = self.previous_level(t, self.stage(batch.progress), noise.sigma_min)
        return ict_loss(model, target, batch.images, batch.z, t, r, huber=self.huber)

    def stage(self, progress: float) -> int:
        """Number of halvings of the gap at ``progress`` in [0, 1): equal stages, then the last one for ``settle``."""
        moving = progress / (1 - self.settle)
        more = self.halvings - self.halved
        return self.halved + min(more, math.floor(moving * more))

    def previous_level(self, t: Tensor, stage: int, sigma_min: float) -> Tensor:
        """The lower noise levels r = t (1 - 2^-stage (1 + k sigmoid(-b t))) of the pairs (t, r), at least sigma_min."""
        gap = (1 + self.gap_scale * torch.sigmoid(-self.gap_steepness * t)) / 2**stage
        return (t * (1 - gap)).clamp_min(sigma_min)
