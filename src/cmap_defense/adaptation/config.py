"""The settings of an adaptation."""

from __future__ import annotations

import dataclasses
from typing import Any

from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError
from cmap_defense.training.config import TrainingConfig

DEFAULT_IMAGES = 200_000
"""Length of an adaptation for which neither ``images`` nor ``minutes`` is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptationConfig(TrainingConfig):
    """Settings of an adaptation: those of ``TrainingConfig``, with other defaults, and these.

    Attributes:
        weight_decay: of AdamW.
        shift: largest random shift of a training image in pixels, up, down, left and right; what it leaves is black.
        attack_steps: gradient steps of the attack on each training image.
        attack_step_size: of these, in units of images in [0, 1]; None for 2.5 eps / attack_steps, at most eps.
        clean_weight: share of the loss of purified clean images; the rest is that of purified attacked ones.
        patience: evaluations on held-out images without a better one after which the adaptation ends; None for none.
            There is one evaluation at each checkpoint, and the best weights are the result.

    Raises:
        SettingsError: a value is out of its range.
    """

    images: int | None = setting(
        None,
        "Length of the training in images, counted with repetition.",
        group="Training",
        minimum=1,
        default_help=f"{DEFAULT_IMAGES}, or what --minutes allow",
    )
    learning_rate: float = setting(
        1e-3, "Largest learning rate. It falls along a half cosine to 0.", group="Training", above=0.0
    )
    warmup_images: int = setting(5_000, "Images over which the learning rate warms up.", group="Training", minimum=0)
    betas: tuple[float, float] = (0.9, 0.999)
    ema_half_life: tuple[int, ...] = setting(
        (3_000,), "Half-life of the averaged weights, which are the result, in images.", group="Training", minimum=1
    )
    checkpoint_every: int = setting(
        10_000, "Number of images between checkpoints, and evaluations.", group="Training", minimum=1
    )
    weight_decay: float = setting(5e-4, "Weight decay of AdamW.", group="Training", minimum=0.0)
    shift: int = setting(2, "Largest random shift of an image in pixels.", group="Data", minimum=0)
    attack_steps: int = setting(
        3, "Number of gradient steps of the attack on each training image.", group="Adversarial training", minimum=1
    )
    attack_step_size: float | None = setting(
        None,
        "Size of the steps of that attack, for images in [0, 1].",
        group="Adversarial training",
        above=0.0,
        default_help="2.5 eps / attack steps, at most eps",
    )
    clean_weight: float = setting(
        0.5,
        "Share of the loss that belongs to clean images; the rest belongs to attacked ones.",
        group="Adversarial training",
        minimum=0.0,
        maximum=1.0,
    )
    patience: int | None = setting(
        None,
        "Stop after this many evaluations on held-out images without a better one.",
        group="Training",
        minimum=1,
        default_help="never",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ema_half_life) > 1:
            raise SettingsError(
                "AdaptationConfig.ema_half_life is one number of images, since the result is one classifier, but is "
                f"{self.ema_half_life!r}."
            )

    def reproducible(self) -> dict[str, Any]:
        """Those of ``TrainingConfig``, and ``micro_batch``: the statistics of BatchNorm are those of a micro-batch."""
        return {**super().reproducible(), "micro_batch": self.micro_batch}

    @property
    def length(self) -> int:
        """``images``, or 200,000 where they are None."""
        return DEFAULT_IMAGES if self.images is None else self.images
