"""What an objective sees, and what it is: losses per image, a pure function of what the loop drew."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange

__all__ = ["Batch", "Denoise", "Objective"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Noisy images [B, C, H, W] and noise levels sigma [B] to images [B, C, H, W]; classes, where there are any, are bound
already."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What one step has to work with; all of it on the network's device.

    images: float32 [B, C, H, W] in [-1, 1]. z: [B, C, H, W], unit normal noise. uniform: float64 [B] in (0, 1), what
    noise levels are drawn by, by inverting their distribution. progress: in [0, 1), the part of the training that is
    done. labels: int64 [B], the classes of the images where the network is told them; None for another. Model and
    target have them bound already.

    Noise and numbers come from (seed, step) and belong to the image's place in the whole batch, so that it is no matter
    how many processes share it.
    """

    images: Tensor
    z: Tensor
    uniform: Tensor
    progress: float
    labels: Tensor | None = None

    def rows(self, chosen: slice) -> Batch:
        """Some of its images, with what was drawn for them."""
        parts = {name: getattr(self, name)[chosen] for name in ("images", "z", "uniform")}
        return dataclasses.replace(self, **parts, labels=None if self.labels is None else self.labels[chosen])


class Objective(abc.ABC):
    """One training objective: its settings, and the loss per image.

    name: as in records and on the command line. kind: what the network is trained to be, "consistency" (f of Song et
    al. 2023) or "denoiser" (the denoiser D of Karras et al. 2022), as in a backbone's record. settings: a frozen
    :class:`~cmap_defense.settings.Settings` of its own.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    settings: Any

    @abc.abstractmethod
    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        """Losses [B], float32 or wider.

        Args:
            model: what is trained.
            batch: what the loop drew for this step.
            noise: the noise levels of the model.
            target: what gives the values to come close to, called without gradients; the model itself, or its running
                average where :meth:`target_decay` gives a number.
        """

    def target_decay(self, progress: float) -> float | None:
        """The decay mu of the target's running average after the step at ``progress``: target <- mu target +
        (1 - mu) model. None where the target is the model itself."""
        return None

    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON, for records and checkpoints."""
        return {"name": self.name, **self.settings.to_dict()}
