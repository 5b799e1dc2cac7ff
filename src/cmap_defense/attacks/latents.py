"""Attacks on latents: their optimisation, and two attacks that look for images on the generator's manifold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.settings import setting
from cmap_defense.threat import ThreatModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSearch(Attack):
    """An attack that optimises latents with Adam and attempts the images that they generate.

    The model must be a purified classifier. Further arguments are those of ``Attack``.

    Args:
        steps: steps of Adam.
        learning_rate: of Adam.
        latents: M, latents per image, each of which gives an attempt.
        start: "purified" for the latents that the defence without step hooks finds for the clean image, at the cost of
            a purification, or "noise".
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
        own = oracle.wrapper(self, clean)
        wrapper = own.variant(settings=own.settings.replace(n_latents=self.latents))
        labels = own.latent_class_labels(clean)
        if labels is not None:
            labels = labels[:, torch.arange(self.latents, device=labels.device) % labels.shape[1]]
        with torch.no_grad():
            if self.start == "noise":
                begin = wrapper.initial_latents(clean, seeds=oracle.starting_noise())
            else:
                oracle.next_noise()
                begin = wrapper.purify(clean, seeds=oracle.starting_noise(), class_labels=labels).latents
        return Searched(wrapper, begin, labels, clean)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttack(LatentSearch):
    """An attack of this package: a misclassified image G(u) near the clean image x, found in the latents u

        min_u  penalty excess(G(u), x) + max(confidence - margin(C(G(u))), 0)

    with the distance outside the ball of ``excess`` and the margin of ``margin``, whose hinge is that of Carlini and
    Wagner 2017 (arXiv 1608.04644, f6). The attempt of each latent is the projected image of the highest margin under
    the undefended classifier. An image that needed no projection is on the manifold, so that a purification has no
    reason to change it. The latent loop is not differentiated.

    Its history holds "margin", of the undefended classifier on the projected images, and "excess", means over the M
    latents.
    Further arguments are those of ``LatentSearch``.

    Args:
        penalty: weight of the excess in the first step.
        growth: factor by which the penalty grows from the first step to the last.
        confidence: the margin in logits beyond which the loss does not fall.
    """

    penalty: float = setting(0.3, above=0.0)
    growth: float = setting(10.0, minimum=1.0)
    confidence: float = setting(10.0, minimum=0.0)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        _, images, _, history = self.search(oracle, clean, goal)
        return Candidates(images, history)

    def search(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Searched, Tensor, Tensor, dict[str, Tensor]]:
        """Search, for attacks that use the attempts; arguments are those of ``run``.

        Returns:
            The initial latents with their purified classifier; the attempts [B, M, C, H, W], projected; the undefended
            classifier's margins [B, M] on them; the history.
        """
        searched = self._searched(oracle, clean)
        pairs = searched.begin.shape[:2]
        best = clean[:, None].repeat(1, self.latents, 1, 1, 1)
        highest = torch.full(pairs, -torch.inf, device=clean.device)
        margins, outside = torch.zeros((2, self.steps, *pairs), device=clean.device)

        def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
            own, wanted = clean[rows], goal.rows(rows).repeated(self.latents)
            generated = searched.generate(latents, rows, own)
            with torch.no_grad():
                legal = project_all(self.threat, generated, own)
                now = margin(searched.classify(legal), wanted).view(generated.shape[:2])
                better = now > highest[rows]
                best[rows] = torch.where(better[:, :, None, None, None], legal.to(best), best[rows])
                highest[rows] = torch.where(better, now.to(highest), highest[rows])
            lead = margin(searched.classify(generated), wanted).view(generated.shape[:2])
            far = excess(self.threat, generated, own)
            margins[step, rows], outside[step, rows] = now.to(margins), far.detach().to(margins)
            weight = self.penalty * self.growth ** (step / max(1, self.steps - 1))
            return weight * far + (self.confidence - lead).clamp_min(0)

        searched.descend(loss, self.steps, lr=self.learning_rate)
        return searched, best, highest, {"margin": margins.mean(dim=2), "excess": outside.mean(dim=2)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overpowered(LatentSearch):
    """The overpowered attack (Jalal et al. 2017, arXiv 1712.09196), within the ball around an image x

        min_{u, u'}  penalty [ excess(G(u), x) + excess(G(u'), x) + excess(G(u), G(u')) ]
                     + max(confidence - lead(G(u)), 0) + max(confidence - margin(G(u')), 0)

    where lead is the logit of the true class less the largest other one, and margin the opposite for the attack's aim.
    It searches pairs of latents whose images are in the ball and within eps of each other, one of them classified
    correctly and the other as the attack aims at. Where there is such a pair, no projection onto the manifold is right
    for both. The attempts are the misclassified image of each pair and the middle of the pair.

    Its history holds "paired", the share of the M pairs that meet these conditions after projection. Further arguments
    are those of ``LatentSearch``.

    Args:
        penalty: weight of the excess.
        confidence: the margin in logits on either side beyond which the loss does not fall.
    """

    penalty: float = setting(1.0, above=0.0)
    confidence: float = setting(5.0, minimum=0.0)

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return super().passes_per_image(model) + self.restarts * self.latents * (self.steps + 2)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        searched = self._searched(oracle, clean).doubled()
        paired = torch.zeros((self.steps, len(clean)), device=clean.device)

        def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
            own, wanted = clean[rows], goal.rows(rows).repeated(self.latents)
            generated = searched.generate(latents, rows, own)
            right, wrong = generated.split(self.latents, dim=1)
            gap = excess(self.threat, wrong.flatten(0, 1)[:, None], right.flatten(0, 1)).view(right.shape[:2])
            far = excess(self.threat, right, own) + excess(self.threat, wrong, own) + gap
            lead = -margin(searched.classify(right), Goal(wanted.labels)).view(right.shape[:2])
            gain = margin(searched.classify(wrong), wanted).view(right.shape[:2])
            with torch.no_grad():
                sides = [searched.classify(side).argmax(dim=1) for side in self._legal(right, wrong, own)]
                both = (sides[0] == wanted.labels) & wanted.reached(sides[1])
                paired[step, rows] = both.view(right.shape[:2]).float().mean(dim=1).to(paired)
            hinges = (self.confidence - lead).clamp_min(0) + (self.confidence - gain).clamp_min(0)
            return self.penalty * far + hinges

        latents = searched.descend(loss, self.steps, lr=self.learning_rate)
        with torch.no_grad():
            generated = torch.cat([searched.generate(latents[rows], rows, clean) for rows in searched.parts()])
        right, wrong = generated.split(self.latents, dim=1)
        right, wrong = self._legal(right, wrong, clean)
        return Candidates(torch.cat([wrong, (right + wrong) / 2], dim=1), {"paired": paired})

    def _legal(self, right: Tensor, wrong: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides [b, M, C, H, W] projected onto the ball around the clean image and within eps of each other."""
        right = project_all(self.threat, right, clean)
        near = self.threat.project(wrong.flatten(0, 1), right.flatten(0, 1)).view_as(wrong)
        return right, project_all(self.threat, near, clean)  # no farther from the right one


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
        """Images [b, M, C, H, W] in [0, 1] of the latents of some images, at positions ``rows`` of the batch, of the
        size of the images ``like``; None for the backbone's size."""
        labels = None if self.class_labels is None else self.class_labels[rows]
        size = None if like is None else like.shape[2:]
        return self.wrapper.generate(latents, self.clean[rows], class_labels=labels, size=size)

    def classify(self, images: Tensor) -> Tensor:
        """The undefended classifier's logits [b M, classes] for images [b, M, C, H, W] in [0, 1]."""
        return self.wrapper.undefended(images.flatten(0, 1))

    def parts(self) -> Iterator[slice]:
        """Images whose latents go through the backbone together, as positions in the batch."""
        count, per_image = self.begin.shape[:2]
        size = count if self.wrapper.max_parallel is None else max(1, self.wrapper.max_parallel // per_image)
        return (slice(first, first + size) for first in range(0, count, max(1, size)))

    def descend(
        self,
        loss: Callable[[Tensor, slice, int], Tensor],
        steps: int,
        *,
        whole: bool = False,
        rate: Callable[[int], float] | None = None,
        **adam: Any,
    ) -> Tensor:
        """Latents [B, M, C, H, W] after steps of ``torch.optim.Adam``, with these options, from the initial ones.

        ``loss`` takes latents [b, M, C, H, W] of a part, its positions and the step, and the sum of what it returns is
        minimised. Each part has a graph of its own; with ``whole`` the batch is one part. ``rate`` is the learning rate
        of a step by its number; None for the same throughout.
        """
        latents = self.begin.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([latents], **adam)
        for step in range(steps):
            parts = [slice(0, len(latents))] if whole else self.parts()
            with torch.enable_grad():
                leaves = [(rows, latents.detach()[rows].requires_grad_()) for rows in parts]
                gradients = [torch.autograd.grad(loss(leaf, rows, step).sum(), leaf)[0] for rows, leaf in leaves]
            latents.grad = torch.cat(gradients)
            if rate is not None:
                optimiser.param_groups[0]["lr"] = rate(step)
            optimiser.step()
        return latents.detach()


def excess(threat: ThreatModel, images: Tensor, clean: Tensor) -> Tensor:
    """How far images [b, M, C, H, W] are outside the ball around clean ones [b, C, H, W], with a gradient back: [b, M].

    In linf it is the sum over pixels of the excess over eps. In l2 it is the excess of the norm over eps, times the
    square root of the number of pixels, so that the gradient per pixel is about the same.
    """
    delta = (images - clean[:, None]).flatten(2)
    if threat.norm == "linf":
        return (delta.abs() - threat.eps).clamp_min(0).sum(dim=2)
    return ((delta.square().sum(dim=2) + 1e-12).sqrt() - threat.eps).clamp_min(0) * delta.shape[2] ** 0.5


def project_all(threat: ThreatModel, images: Tensor, clean: Tensor) -> Tensor:
    """Images [B, M, C, H, W] projected onto the threat model around clean ones [B, C, H, W]."""
    return torch.stack([threat.project(part, clean) for part in images.unbind(dim=1)], dim=1)
