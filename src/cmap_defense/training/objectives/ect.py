"""Easy consistency tuning: consistency training with a gap that halves over training, from scratch or from a denoiser
(Geng et al. 2024, arXiv 2406.14548, section 4)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.errors import SettingsError
from cmap_defense.settings import Settings, require_integer, require_number
from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.ict import ict_loss
from cmap_defense.training.objectives.levels import lognormal_levels

__all__ = ["ECT", "ECTSettings", "ect_previous_level", "ect_stage"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ECTSettings(Settings):
    """Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548); the defaults are for a training from scratch.

    sigma_mean, sigma_std: of ln sigma, a normal distribution, then clamped to the noise range.
    halvings: how often the gap between the two noise levels is halved in all; stage 0 is a denoiser.
    halved: how often it has been before this training, which starts from the weights of a consistency model.
    settle: fraction of the training that is left to the last stage.
    gap_scale, gap_steepness: k and b of the gap's dependence on sigma, 1 + k sigmoid(-b sigma).
    huber: c of the Pseudo-Huber distance sqrt(d^2 + c^2) - c between whole images.
    """

    sigma_mean: float = -0.8
    sigma_std: float = 2.2
    halvings: int = 7
    halved: int = 0
    settle: float = 0.25
    gap_scale: float = 8.0
    gap_steepness: float = 1.0
    huber: float = 0.03

    def __post_init__(self) -> None:
        require_number("ECTSettings", "sigma_mean", self.sigma_mean)
        require_number("ECTSettings", "sigma_std", self.sigma_std, above=0.0)
        if require_integer("ECTSettings", "halvings", self.halvings, minimum=0) > 16:
            raise SettingsError(
                f"ECTSettings.halvings must be at most 16, but is {self.halvings}: the gap would vanish."
            )
        require_integer("ECTSettings", "halved", self.halved, minimum=0)
        if self.halved > self.halvings:
            raise SettingsError(
                f"ECTSettings.halved ({self.halved}) must not be above ECTSettings.halvings ({self.halvings})."
            )
        require_number("ECTSettings", "settle", self.settle, minimum=0.0, below=1.0)
        require_number("ECTSettings", "gap_scale", self.gap_scale, minimum=0.0)
        require_number("ECTSettings", "gap_steepness", self.gap_steepness, above=0.0)
        require_number("ECTSettings", "huber", self.huber, above=0.0)


class ECT(Objective):
    """Pairs of noise levels (t, r) whose gap halves again and again; the first stage is a denoiser.

    The loss is that of improved consistency training, :func:`~cmap_defense.training.objectives.ict.ict_loss`.

    A training may start from the weights of a denoiser (:class:`~cmap_defense.training.objectives.edm.EDM`): D and f
    are the same network, whose scalings differ by sigma_min alone, and D is what the first stage comes to. It may go on
    from a consistency model too, with ``halved`` as its training left it.
    """

    name = "ect"
    kind = "consistency"

    def __init__(self, settings: ECTSettings | None = None) -> None:
        self.settings = settings or ECTSettings()

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        s = self.settings
        t = lognormal_levels(batch.uniform, s.sigma_mean, s.sigma_std, noise)
        r = ect_previous_level(t, ect_stage(batch.progress, s), s, noise.sigma_min)
        return ict_loss(model, target, batch.images, batch.z, t, r, huber=s.huber)


def ect_stage(progress: float, settings: ECTSettings) -> int:
    """The number of halvings of the gap at ``progress`` in [0, 1): equal stages, then the last one for ``settle``."""
    moving = progress / (1 - settings.settle)
    more = settings.halvings - settings.halved
    return settings.halved + min(more, math.floor(moving * more))


def ect_previous_level(t: Tensor, stage: int, settings: ECTSettings, sigma_min: float) -> Tensor:
    """The lower noise level r of the pair (t, r): r = t (1 - 2^-stage (1 + k sigmoid(-b t))), sigma_min at least."""
    gap = (1 + settings.gap_scale * torch.sigmoid(-settings.gap_steepness * t)) / 2**stage
    return (t * (1 - gap)).clamp_min(sigma_min)
