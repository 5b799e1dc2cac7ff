"""Samples of a model in training, always from the same noise."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from cmap_defense.backbones.karras import ConsistencyBackbone, karras_levels
from cmap_defense.common.modules import device_of
from cmap_defense.common.rng import draw_latents
from cmap_defense.training.objectives import Model, heun_step

SAMPLES = 64
LEVELS = 18
"""Noise levels of a denoiser's sampler (arXiv 2206.00364, Table 1, for CIFAR-10)."""


@torch.no_grad()
def sample_grid(model: Model, seed: int = 0) -> Tensor:
    """64 samples of a model; of a class-conditional one, class after class.

    A consistency model makes them in one step, a denoiser in 18 steps of Heun's method (arXiv 2206.00364, Algorithm 1).
    """
    device = device_of(model) or torch.device("cpu")
    latents = draw_latents(torch.tensor([seed]), SAMPLES, model.image_shape)[0].to(device)
    classes = None if model.num_classes is None else torch.arange(SAMPLES, device=device) % model.num_classes
    if isinstance(model, ConsistencyBackbone):
        return (model.generate(latents, classes) + 1) / 2
    denoise = functools.partial(model.denoise, class_labels=classes)
    levels = [latents.new_full((SAMPLES,), level) for level in reversed(karras_levels(LEVELS, model.noise))]
    images = model.noise.sigma_max * latents
    for t, r in itertools.pairwise(levels):
        images = heun_step(denoise, images, t, r)
    return (denoise(images, levels[-1]).clamp(-1, 1) + 1) / 2  # the last step, to no noise, is one of Euler's
