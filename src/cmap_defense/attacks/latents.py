"""Shared by attacks on latents: initial latents, their optimisation, and the images that they generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.settings import setting
from cmap_defense.threat import ThreatModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSearch(Attack):
    """An attack that optimises latents with Adam and attempts the images that they generate.

    The model must be a purified classifier. Further arguments are those of ``Attack``.

    Args:
        steps: steps of Adam, at least 1.
        learning_rate: of Adam.
        latents: M, latents per image, each of which gives an attempt.
        start: "purified" for the latents that the defence finds for the clean image, at the cost of a purification, or
            "noise".
    """

    needs_latents: ClassVar[bool] = True

    steps: int = setting(200, minimum=1)
    learning_rate: float = setting(0.05, above=0.0)
    latents: int = setting(4, minimum=1)
    start: str = setting("purified", choices=("purified", "noise"))

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        purified = model.settings.iterations + 1 if self.start == "purified" else 0
        return self.restarts * self.latents * (purified + self.steps)

    def _searched(self, oracle: Oracle, clean: Tensor) -> Searched:
        """The wrapper with M latents per image, and the initial latents."""
        own = oracle.wrapper(self)
        wrapper = own.variant(settings=own.settings.replace(n_latents=self.latents))
        oracle.check_classes(own, clean)
        labels = own.latent_class_labels(clean)
        if labels is not None:
            labels = labels[:, torch.arange(self.latents, device=labels.device) % labels.shape[1]]
        with torch.no_grad():
            if self.start == "noise":
                begin = wrapper.initial_latents(clean, seeds=oracle.own_seeds())
            else:
                begin = wrapper.purify(clean, seeds=oracle.next_noise(), class_labels=labels).latents
        return Searched(wrapper, begin, labels, clean)


@dataclasses.dataclass(frozen=True, eq=False)
class Searched:
    """A search over the latents of a batch of images.

    Attributes:
        wrapper: the purified classifier.
        begin: [B, M, C, H, W], the initial latents.
        class_labels: [B, M] integers; None where the backbone is not class-conditional.
        clean: [B, C, H, W], the clean images, around which latents with a noise level live.
    """

    wrapper: PurifiedClassifier
    begin: Tensor
    class_labels: Tensor | None
    clean: Tensor

    def doubled(self) -> Searched:
        """The search with each image's latents twice, [B, 2 M, C, H, W]."""
        labels = None if self.class_labels is None else self.class_labels.repeat(1, 2)
        return Searched(self.wrapper, self.begin.repeat(1, 2, 1, 1, 1), labels, self.clean)

    def generate(self, latents: Tensor, rows: slice, like: Tensor | None) -> Tensor:
        """Generate the images of latents.

        Args:
            latents: [b, M, C, H, W], of some images.
            rows: positions of these images in the batch.
            like: images [..., C, H, W] whose size the generated ones get; None for the backbone's size.

        Returns:
            [b, M, C, H, W] in [0, 1].
        """
        labels = None if self.class_labels is None else self.class_labels[rows]
        size = None if like is None else like.shape[2:]
        return self.wrapper.generate(latents, self.clean[rows], class_labels=labels, size=size)

    def classify(self, images: Tensor) -> Tensor:
        """The bare classifier's logits [b M, classes] for images [b, M, C, H, W] in [0, 1]."""
        return self.wrapper.undefended(images.flatten(0, 1))

    def parts(self) -> Iterator[slice]:
        """Images whose latents go through the backbone together, as positions in the batch."""
        count, per_image = self.begin.shape[:2]
        size = count if self.wrapper.max_parallel is None else max(1, self.wrapper.max_parallel // per_image)
        return (slice(first, first + size) for first in range(0, count, max(1, size)))


def descend(
    begin: Tensor,
    parts: Callable[[], Iterator[slice]],
    loss: Callable[[Tensor, slice, int], Tensor],
    steps: int,
    **adam: Any,
) -> Tensor:
    """Minimise a loss over latents with Adam.

    Args:
        begin: [B, M, C, H, W], the initial latents.
        parts: gives positions of images whose latents go through the backbone together, in a graph of their own.
        loss: from latents [b, M, C, H, W] of a part, its positions and the step to losses, whose sum is minimised.
        steps: number of steps.
        adam: options of ``torch.optim.Adam``.

    Returns:
        Latents [B, M, C, H, W].
    """
    latents = begin.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([latents], **adam)
    for step in range(steps):
        with torch.enable_grad():
            leaves = [(rows, latents.detach()[rows].requires_grad_()) for rows in parts()]
            gradients = [torch.autograd.grad(loss(leaf, rows, step).sum(), leaf)[0] for rows, leaf in leaves]
        latents.grad = torch.cat(gradients)
        optimiser.step()
    return latents.detach()


def excess(threat: ThreatModel, images: Tensor, clean: Tensor) -> Tensor:
    """How far images are outside the ball, with a gradient back into it.

    In linf it is the sum over pixels of the excess over eps. In l2 it is the excess of the norm over eps, times the
    square root of the number of pixels, so that the gradient per pixel is about the same.

    Args:
        threat: the threat model.
        images: [b, M, C, H, W], M images for each clean one.
        clean: [b, C, H, W].

    Returns:
        [b, M].
    """
    delta = (images - clean[:, None]).flatten(2)
    if threat.norm == "linf":
        return (delta.abs() - threat.eps).clamp_min(0).sum(dim=2)
    return ((delta.square().sum(dim=2) + 1e-12).sqrt() - threat.eps).clamp_min(0) * delta.shape[2] ** 0.5


def project_all(threat: ThreatModel, images: Tensor, clean: Tensor) -> Tensor:
    """Project images onto the threat model.

    Args:
        threat: the threat model.
        images: [B, M, C, H, W], M images for each clean one.
        clean: [B, C, H, W].

    Returns:
        [B, M, C, H, W].
    """
    return torch.stack([threat.project(part, clean) for part in images.unbind(dim=1)], dim=1)
