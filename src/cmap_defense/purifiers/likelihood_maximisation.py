"""Likelihood maximisation: a few Adam steps on the image itself that make it easier to denoise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.cmap.adam import AdamState, adam_step
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError
from cmap_defense.purifiers.multi_step import MultiStepPurifier, Run

__all__ = ["LikelihoodMaximisation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodMaximisation(MultiStepPurifier):
    """Adam steps on x of the denoising loss (Chen et al. 2024, arXiv 2305.15241, section 3.2).

    The loss is that of denoising (Karras et al. 2022, arXiv 2206.00364, eq. 2), the mean over the pixels of
    (D(x + sigma e, sigma) - x)^2, with fresh noise e and a fresh level sigma in each step, x in [-1, 1]. Its gradient
    goes through D, so that the exact gradient of the purification has second derivatives of D.

    Differences from the official code (huanranchen/DiffusionClassifier): its loss is a mean over the batch as well, and
    its noise the same for every call; the result of an image does not depend on the others here, and its noise comes
    from its seed. Its bound of 100 on the l2 change of an image, which is larger than any change of a CIFAR-10 image,
    is left out.

    Args:
        iterations: Adam steps, one network pass forward and backward each; 0 gives the input back.
        learning_rate: of Adam, in units of images in [-1, 1].
        sigmas: lowest and highest standard deviation of the noise, between which it is uniform.
        n_latents: K, the purified versions of an image.

    Raises:
        SettingsError: a value is out of its range.
    """

    _sets_level: ClassVar[str] = "sigmas"
    _synonyms: ClassVar[Mapping[str, str]] = {"steps": "iterations"}
    _advice: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("level", "sigma"), "Its levels are drawn between two: LikelihoodMaximisation(sigmas=(0.4, 0.6))."
    )
    _graphs: ClassVar[int] = 3
    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cifar10-linf": {}, "cifar10-l2": {}}

    iterations: int = setting(5, minimum=0)
    learning_rate: float = setting(0.1, above=0)
    sigmas: tuple[float, float] = setting((0.4, 0.6), above=0)
    n_latents: int = setting(1, minimum=1)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigmas[0] > self.sigmas[1]:
            raise SettingsError(f"{type(self).__name__}.sigmas must be the lower one first, but is {self.sigmas!r}.")

    @property
    def level(self) -> float:
        return self.sigmas[1]

    @property
    def steps(self) -> int:
        return self.iterations

    def reverse(self, run: Run) -> Tensor:
        adam = CMAPSettings(learning_rate=self.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        low, high = self.sigmas
        x, state = run.images, AdamState.start(run.images)
        for n in range(self.iterations):
            noise = run.noise()
            sigmas = low + (high - low) * run.uniform()
            x = run.watch(n, high, x)
            gradient = run.denoise.in_chunks(
                _loss_gradient, x, noise, sigmas, run.denoise.class_labels, run.denoise.once
            )
            x, state = adam_step(x, gradient, state, adam)
        return x


def _loss_gradient(
    x: Tensor, noise: Tensor, sigmas: Tensor, class_labels: Tensor | None, denoise: Callable[..., Tensor]
) -> Tensor:
    """The gradient of the loss of each image with respect to it, differentiable where x or the noise is."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or noise.requires_grad)
    with torch.enable_grad():
        inside = x if x.requires_grad else x.detach().requires_grad_()
        clean = denoise(inside + sigmas[:, None, None, None] * noise, sigmas, class_labels)
        loss = (clean - inside).square().flatten(1).mean(dim=1).sum()
        return torch.autograd.grad(loss, inside, create_graph=wanted)[0]
