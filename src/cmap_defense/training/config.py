"""The settings of a training; those of an objective and of a network stand beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError

PRECISIONS = ("auto", "bfloat16", "float32")
WEIGHTS_DTYPES = ("float32", "bfloat16", "float16")

DEFAULT_IMAGES = 1_000_000
"""Length of a training for which neither ``images`` nor ``minutes`` is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """Settings of a training. Lengths are counted in images, so that they do not depend on the batch size.

    The fields of the group "Running", ``minutes`` and ``weights`` may change when a training is continued: they change
    what is computed only by rounding, and by the dropout masks, which depend on the layout of the weights. (Not so
    ``micro_batch`` of an adaptation, since the statistics of BatchNorm are those of a micro-batch.) A change between
    the CPU and CUDA draws other noise from there on, since these have other generators.

    Attributes:
        images: length of the training, counted with repetition; None for the length that was chosen before, else what
            fits into ``minutes``, else 1,000,000.
        minutes: time after which the training stops with a checkpoint; None for no limit.
        batch_size: images per optimiser step, over all processes.
        learning_rate: largest learning rate of Adam, after the warm-up; it falls to zero along a half cosine.
        warmup_images: images over which the learning rate rises linearly.
        betas: of Adam.
        clip_norm: largest global norm of the gradient. Nearly every gradient of a loss that is a sum over pixels is
            larger; the steps of Adam do not depend on its scale.
        ema_half_life: half-lives of the averaged weights in images, one or several. The backbone has the first one's
            average; the others are written beside it at the end. Half-lives are at most a twentieth of the images
            seen.
        flip: whether images are mirrored with probability 1/2.
        precision: of the network's arithmetic: "bfloat16" (autocast), "float32", or "auto", which is bfloat16 where
            the device multiplies it natively. A continued training keeps its precision under "auto".
        seed: of the initial weights, the order of the data and the noise.
        checkpoint_every: images between checkpoints.
        device: to train on, by name or as a ``torch.device``.
        compile: whether the network runs through torch.compile.
        channels_last: whether weights are laid out with the channels last; None for yes on CUDA.
        hold_images: whether the images are kept on the device; None for yes where they take at most a quarter of its
            free memory.
        checkpoint_part_mb: largest size of a file of a checkpoint in 10^6 bytes; None for one file.
        micro_batch: images per forward pass in each process; None for its whole share of the batch.
        weights: precision of the weights in the written backbone.

    Raises:
        SettingsError: a value is out of its range.
    """

    images: int | None = setting(
        None,
        "Length of the training in images, counted with repetition.",
        minimum=1,
        default_help=f"{DEFAULT_IMAGES}, or what --minutes allow",
    )
    minutes: float | None = setting(
        None, "Stop after this many minutes; the same command then continues.", above=0.0, default_help="no limit"
    )
    batch_size: int = setting(128, "Images per optimiser step, over all processes.", minimum=1)
    learning_rate: float = setting(8e-4, "Largest learning rate. It falls along a half cosine to 0.", above=0.0)
    warmup_images: int = setting(20_000, "Images over which the learning rate warms up.", minimum=0)
    betas: tuple[float, float] = setting((0.9, 0.99), minimum=0.0, below=1.0)
    clip_norm: float = setting(1.0, "Largest norm of the gradient. Larger gradients are scaled down to it.", above=0.0)
    ema_half_life: tuple[int, ...] = setting(
        (30_000,),
        "Half-life of the averaged weights in images. Of several with commas the first one's average is the backbone.",
        minimum=1,
    )
    flip: bool = setting(True, "Mirror each image with a probability of one half.", group="Data")
    precision: str = setting(
        "auto",
        "Precision of the network's arithmetic; auto is bfloat16 where the device multiplies it natively.",
        choices=PRECISIONS,
    )
    seed: int = setting(0, "Seed of the initial weights, the order of the data and the noise.", minimum=0)
    checkpoint_every: int = setting(50_000, "Number of images between checkpoints.", minimum=1)
    device: str = setting("cpu", "Device to compute on, such as cuda.", group="Running")
    compile: bool = setting(False, "Run the network through torch.compile.", group="Running")
    channels_last: bool | None = setting(
        None, "Lay the weights out with the channels last.", group="Running", default_help="on CUDA"
    )
    hold_images: bool | None = setting(
        None, "Keep all images in the memory of the device.", group="Running", default_help="where they fit"
    )
    checkpoint_part_mb: int | None = setting(
        None,
        "Size in megabytes at which a checkpoint is divided into several files.",
        group="Running",
        minimum=1,
        default_help="no limit",
    )
    micro_batch: int | None = setting(
        None,
        "Number of images that each process computes at the same time.",
        group="Running",
        minimum=1,
        default_help="all of its batch",
    )
    weights: str = setting(
        "float32",
        "Precision of the weights in the file that is written.",
        group="Record and weights",
        choices=WEIGHTS_DTYPES,
    )

    def __post_init__(self) -> None:
        if type(self.device).__name__ == "device":  # torch's own; this module does without torch
            object.__setattr__(self, "device", str(self.device))
        super().__post_init__()
        lives = self.ema_half_life
        if not lives or len(set(lives)) != len(lives):
            raise SettingsError(
                "TrainingConfig.ema_half_life must be one integer or several that differ from each other, but is "
                f"{lives!r}."
            )

    @property
    def length(self) -> int:
        """``images``, or 1,000,000 where they are None."""
        return DEFAULT_IMAGES if self.images is None else self.images

    @property
    def steps(self) -> int:
        """Optimiser steps in all; the last one may exceed ``length``."""
        return -(-self.length // self.batch_size)

    @property
    def checkpoint_steps(self) -> int:
        """Steps from one checkpoint to the next."""
        return max(1, self.checkpoint_every // self.batch_size)

    def reproducible(self) -> dict[str, Any]:
        """The fields that decide the weights, as JSON: what records hold and checkpoints are compared by."""
        free = {"minutes", "weights"} | {
            f.name for f in dataclasses.fields(self) if f.metadata.get("group") == "Running"
        }
        return {name: value for name, value in self.to_dict().items() if name not in free}
