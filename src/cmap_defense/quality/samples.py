"""Images of a backbone, each a function of (seed, number) alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import device_of
from cmap_defense.common.rng import derived_seeds, draw_latents

SAMPLES = 0x5A3B1E
"""Separates the latents of the samples from other noise of the same seed."""


def sample_images(
    model: PurifiedClassifier, numbers: Tensor, *, seed: int = 0, size: Sequence[int] | None = None
) -> Tensor:
    """G of unit noise: images [B, C, H, W] in [0, 1] on the model's device, without a gradient.

    Args:
        model: for its backbone; of one that is class-conditional sample i is of class i modulo their
            number.
        numbers: int64 [B], which samples.
        seed: of all of them.
        size: (H, W) of the images, where the model resizes; None for the backbone's.
    """
    device = device_of(model) or torch.device("cpu")
    latents = draw_latents(derived_seeds(derived_seeds(numbers, SAMPLES), seed), 1, model.image_shape).to(device)
    classes = getattr(model.backbone, "num_classes", None)
    labels = None if classes is None else (numbers % classes).to(device)[:, None]
    with torch.no_grad():
        return model.generate(latents, class_labels=labels, size=size)[:, 0]
