"""Settings of the training loop; those of an objective stand beside it."""

from __future__ import annotations

import dataclasses

from cmap_defense.errors import SettingsError
from cmap_defense.settings import Settings, require_choice, require_integer, require_number, require_numbers

__all__ = ["TrainSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """The training loop; lengths are counted in images seen, so that they do not depend on the batch size.

    images: length of the training. batch_size: images per optimiser step.
    learning_rate: of Adam at its height; it rises over warmup_images and falls to zero along a half cosine.
    betas: of Adam. clip_norm: gradients with a larger global norm are scaled down to it.
    ema_half_life: half-life in images of the averaged weights, the ones that are kept;
    at the start it is a twentieth of the images seen.
    flip: mirror each image with probability 1/2. precision: of the network's arithmetic, "bfloat16" or "float32".
    checkpoint_every: images between checkpoints. seed: of the weights, the data order and the noise.
    """

    images: int = 1_000_000
    batch_size: int = 128
    learning_rate: float = 8e-4
    warmup_images: int = 20_000
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_half_life: int = 30_000
    flip: bool = True
    precision: str = "bfloat16"
    checkpoint_every: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "ema_half_life", "checkpoint_every"):
            require_integer("TrainSettings", name, getattr(self, name), minimum=1)
        require_integer("TrainSettings", "warmup_images", self.warmup_images, minimum=0)
        require_integer("TrainSettings", "seed", self.seed, minimum=0)
        require_number("TrainSettings", "learning_rate", self.learning_rate, above=0.0)
        require_number("TrainSettings", "clip_norm", self.clip_norm, above=0.0)
        betas = require_numbers("TrainSettings", "betas", self.betas, length=2, minimum=0.0, below=1.0)
        object.__setattr__(self, "betas", betas)
        require_choice("TrainSettings", "precision", self.precision, ("bfloat16", "float32"))
        if not isinstance(self.flip, bool):
            raise SettingsError(f"TrainSettings.flip must be a boolean, but is {self.flip!r}.")

    @property
    def steps(self) -> int:
        """Optimiser steps in all; the last one may see images beyond ``images``."""
        return -(-self.images // self.batch_size)
