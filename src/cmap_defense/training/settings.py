"""Settings of the training loop, and of how it is carried out; those of an objective stand beside it."""

from __future__ import annotations

import dataclasses

from cmap_defense.errors import SettingsError
from cmap_defense.settings import (
    Settings,
    require_choice,
    require_flag,
    require_integer,
    require_number,
    require_numbers,
)

__all__ = ["PRECISIONS", "Execution", "TrainSettings"]

PRECISIONS = ("auto", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """The training loop; lengths are counted in images seen, so that they do not depend on the batch size.

    images: length of the training. batch_size: images per optimiser step, all processes together.
    learning_rate: of Adam at its height; it rises over warmup_images and falls to zero along a half cosine.
    betas: of Adam. clip_norm: gradients with a larger global norm are scaled down to it. Of losses that are sums over
    pixels that is nearly every one; Adam's steps do not hang on their scale.
    ema_half_lives: half-lives in images of the averaged weights; the first one's are kept as the backbone, the others
    are written beside it at the end. At the start a half-life is a twentieth of the images seen.
    flip: mirror each image with probability 1/2.
    precision: of the network's arithmetic, "bfloat16" (autocast), "float32", or "auto": bfloat16 where the device
    multiplies it natively and float32 elsewhere; a continued training keeps the one that it began with.
    checkpoint_every: images between checkpoints. seed: of the weights, the data order and the noise.
    """

    images: int = 1_000_000
    batch_size: int = 128
    learning_rate: float = 8e-4
    warmup_images: int = 20_000
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_half_lives: tuple[int, ...] = (30_000,)
    flip: bool = True
    precision: str = "auto"
    checkpoint_every: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "checkpoint_every"):
            require_integer("TrainSettings", name, getattr(self, name), minimum=1)
        require_integer("TrainSettings", "warmup_images", self.warmup_images, minimum=0)
        require_integer("TrainSettings", "seed", self.seed, minimum=0)
        require_number("TrainSettings", "learning_rate", self.learning_rate, above=0.0)
        require_number("TrainSettings", "clip_norm", self.clip_norm, above=0.0)
        betas = require_numbers("TrainSettings", "betas", self.betas, length=2, minimum=0.0, below=1.0)
        object.__setattr__(self, "betas", betas)
        lives = self.ema_half_lives
        if not isinstance(lives, (list, tuple)) or not lives:
            raise SettingsError(f"TrainSettings.ema_half_lives must be one integer or several, but is {lives!r}.")
        lives = tuple(require_integer("TrainSettings", "ema_half_lives", life, minimum=1) for life in lives)
        if len(set(lives)) != len(lives):
            raise SettingsError(f"TrainSettings.ema_half_lives must differ from each other, but are {lives}.")
        object.__setattr__(self, "ema_half_lives", lives)
        require_choice("TrainSettings", "precision", self.precision, PRECISIONS)
        require_flag("TrainSettings", "flip", self.flip)

    @property
    def steps(self) -> int:
        """Optimiser steps in all; the last one may see images beyond ``images``."""
        return -(-self.images // self.batch_size)

    @property
    def checkpoint_steps(self) -> int:
        """Steps from one checkpoint to the next."""
        return max(1, self.checkpoint_every // self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(Settings):
    """How a training is carried out. It may differ from one call to the next that continues it: what is computed stays
    the same up to rounding, and up to the masks of dropout, which go by the layout of the weights.

    compile: run the network through torch.compile.
    channels_last: weights laid out channels last; None: on CUDA.
    hold_images: the training set on the network's device; None: where it takes a quarter of the free memory at most.
    part_mb: largest size of a file of a checkpoint, in 10^6 bytes; None: one file for all tensors.
    micro_batch: images that go through the network at a time in each process; None: all that it has of a batch.
    """

    compile: bool = False
    channels_last: bool | None = None
    hold_images: bool | None = None
    part_mb: int | None = None
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        require_flag("Execution", "compile", self.compile)
        for name in ("channels_last", "hold_images"):
            if getattr(self, name) is not None:
                require_flag("Execution", name, getattr(self, name))
        for name in ("part_mb", "micro_batch"):
            if getattr(self, name) is not None:
                require_integer("Execution", name, getattr(self, name), minimum=1)
