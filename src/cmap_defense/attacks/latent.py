"""Adversarial images on the generator's manifold."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.attacks.base import Candidates
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.latents import LatentSearch, Searched, descend, excess, project_all
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.common.settings import setting


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The attempts of a latent attack.

    Attributes:
        searched: the initial latents and their purified classifier.
        images: [B, M, C, H, W], projected.
        margins: [B, M], of the bare classifier on these.
        history: that of the attack.
    """

    searched: Searched
    images: Tensor
    margins: Tensor
    history: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttack(LatentSearch):
    """An attack of this package: a misclassified image G(u) near the clean image x, found in the latents u

        min_u  penalty excess(G(u), x) + max(confidence - margin(C(G(u))), 0)

    with the distance outside the ball of ``excess`` and the margin of
    ``margin``, whose hinge is that of Carlini and Wagner 2017 (arXiv 1608.04644, f6).
    The attempt of each latent is the projected image of the highest margin under the bare classifier. An image that
    needed no projection is on the manifold, so that a purification has no reason to change it. The latent loop is not
    differentiated.

    Its history holds "margin", of the bare classifier on the projected images, and "excess", means over the M latents.
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
        found = self.search(oracle, clean, goal)
        return Candidates(found.images, found.history)

    def search(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Found:
        """Search, for attacks that use the attempts; arguments are those of ``run``."""
        searched = self._searched(oracle, clean)
        pairs = searched.begin.shape[:2]
        best = clean[:, None].repeat(1, self.latents, 1, 1, 1)
        highest = torch.full(pairs, -torch.inf, device=clean.device)
        margins = torch.zeros((self.steps, *pairs), device=clean.device)
        outside = torch.zeros_like(margins)

        def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
            own = clean[rows]
            wanted = goal.rows(rows).repeated(self.latents)
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

        descend(searched.begin, searched.parts, loss, self.steps, lr=self.learning_rate)
        return Found(searched, best, highest, {"margin": margins.mean(dim=2), "excess": outside.mean(dim=2)})
