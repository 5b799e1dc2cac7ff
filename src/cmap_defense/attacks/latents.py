"""What attacks on latents have in common: where latents start, how they are moved, what they generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.settings import require_choice, require_integer, require_number
from cmap_defense.threat import ThreatModel

__all__ = ["LatentSearch", "Searched", "descend", "excess", "project_all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSearch(Attack):
    """An attack that searches latents instead of images, and submits what they generate.

    Args:
        steps: of Adam on the latents, 1 at least.
        learning_rate: of the same.
        latents: M per image; each gives an attempt of its own.
        start: "purified", from the latents that the defence finds for the clean image (it costs a purification), or
            "noise".

    Other arguments: :class:`~cmap_defense.attacks.base.Attack`. The model must be a purified classifier.
    """

    steps: int = 200
    learning_rate: float = 0.05
    latents: int = 4
    start: str = "purified"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        require_integer(name, "steps", self.steps, minimum=1)
        require_number(name, "learning_rate", self.learning_rate, above=0.0)
        require_integer(name, "latents", self.latents, minimum=1)
        require_choice(name, "start", self.start, ("purified", "noise"))

    def _searched(self, oracle: Oracle, clean: Tensor) -> Searched:
        """The wrapper with M latents per image, and where they start."""
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
    """Latents that an attack searches.

    Attributes:
        wrapper: the model whose latents they are.
        begin: [B, M, C, H, W], where the search starts.
        class_labels: [B, M] integers, or None where the backbone is not class-conditional.
        clean: [B, C, H, W], the clean images, around which latents with a noise level live.
    """

    wrapper: PurifiedClassifier
    begin: Tensor
    class_labels: Tensor | None
    clean: Tensor

    def doubled(self) -> Searched:
        """Twice the latents: each image's M, and the same M once more."""
        labels = None if self.class_labels is None else self.class_labels.repeat(1, 2)
        return Searched(self.wrapper, self.begin.repeat(1, 2, 1, 1, 1), labels, self.clean)

    def generate(self, latents: Tensor, rows: slice, like: Tensor | None) -> Tensor:
        """G of the latents of some images, [b, M, C, H, W] in [0, 1]; at the size of ``like``, or the backbone's."""
        labels = None if self.class_labels is None else self.class_labels[rows]
        size = None if like is None else like.shape[2:]
        return self.wrapper.generate(latents, self.clean[rows], class_labels=labels, size=size)

    def classify(self, shown: Tensor) -> Tensor:
        """The bare classifier's logits [b M, classes] on images [b, M, C, H, W] in [0, 1]."""
        return self.wrapper.undefended(shown.flatten(0, 1))

    def parts(self) -> Iterator[slice]:
        """Images whose latents go through the backbone together."""
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
    """Adam on latents [B, M, C, H, W].

    Args:
        begin: where to start.
        parts: the images whose latents go through the backbone together, with a graph of their own.
        loss: of the latents [b, M, C, H, W] of a part, the part and the step; its sum is lowered.
        steps: how many.
        adam: options of :class:`torch.optim.Adam`.
    """
    latents = begin.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([latents], **adam)
    for step in range(steps):
        with torch.enable_grad():
            pieces = [(rows, latents.detach()[rows].requires_grad_()) for rows in parts()]
            gradients = [torch.autograd.grad(loss(leaf, rows, step).sum(), leaf)[0] for rows, leaf in pieces]
        latents.grad = torch.cat(gradients)
        optimiser.step()
    return latents.detach()


def excess(threat: ThreatModel, shown: Tensor, clean: Tensor) -> Tensor:
    """[b, M], how far images [b, M, C, H, W] are outside the ball around [b, C, H, W]; smooth enough to be pulled back.

    linf: the sum over pixels of what exceeds eps. l2: what the norm exceeds eps by, times the root of the number of
    pixels, so that both pull on a pixel alike.
    """
    delta = (shown - clean[:, None]).flatten(2)
    if threat.norm == "linf":
        return (delta.abs() - threat.eps).clamp_min(0).sum(dim=2)
    return ((delta.square().sum(dim=2) + 1e-12).sqrt() - threat.eps).clamp_min(0) * delta.shape[2] ** 0.5


def project_all(threat: ThreatModel, shown: Tensor, clean: Tensor) -> Tensor:
    """Each of [B, M, C, H, W] onto the ball around [B, C, H, W]."""
    return torch.stack([threat.project(part, clean) for part in shown.unbind(dim=1)], dim=1)
