"""Adversarial images from the generator itself: nothing in them is off its manifold."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.attacks.base import Candidates
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.latents import LatentSearch, Searched, descend, excess, project_all
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.settings import require_number

__all__ = ["LatentAttack"]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a latent attack found.

    images: [B, M, C, H, W], projected. margins: [B, M], the bare classifier's on them. searched: the latents' origin.
    history: as of the attack.
    """

    searched: Searched
    images: Tensor
    margins: Tensor
    history: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttack(LatentSearch):
    """Latents near the image that the classifier calls something else:

        min_u  penalty excess(G(u), x) + max(confidence - margin(C(G(u))), 0)

    with excess the distance outside the ball (:func:`~cmap_defense.attacks.latents.excess`) and the margin of
    :func:`~cmap_defense.attacks.goal.margin`. G(u) is not clamped to the ball on the way, which would lose its
    gradient; the best of each latent, judged by the bare classifier after projection, is submitted and purified afresh.
    As far as it needed no projection it is on the manifold, and a purification has no reason to leave it. The latent
    loop is not differentiated.

    Args:
        penalty: on the excess. growth: the penalty grows by this factor from the first step to the last.
        confidence: the lead in logits that is asked for.

    Other arguments: :class:`~cmap_defense.attacks.latents.LatentSearch`.

    history: "margin" of the bare classifier on the projected images and "excess", means over the M latents.
    """

    penalty: float = 0.3
    growth: float = 10.0
    confidence: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("LatentAttack", "penalty", self.penalty, above=0.0)
        require_number("LatentAttack", "growth", self.growth, minimum=1.0)
        require_number("LatentAttack", "confidence", self.confidence, minimum=0.0)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        found = self.search(oracle, clean, goal)
        return Candidates(found.images, found.history)

    def search(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Found:
        """The attempts with all that is known of them, for attacks that build on these."""
        searched = self._searched(oracle, clean)
        pairs = searched.begin.shape[:2]
        best = clean[:, None].repeat(1, self.latents, 1, 1, 1)
        highest = torch.full(pairs, -torch.inf, device=clean.device)
        margins = torch.zeros((self.steps, *pairs), device=clean.device)
        outside = torch.zeros_like(margins)

        def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
            own = clean[rows]
            wanted = goal.rows(rows).repeated(self.latents)
            shown = searched.generate(latents, rows, own)
            with torch.no_grad():
                legal = project_all(self.threat, shown, own)
                now = margin(searched.classify(legal), wanted).view(shown.shape[:2])
                better = now > highest[rows]
                best[rows] = torch.where(better[:, :, None, None, None], legal.to(best), best[rows])
                highest[rows] = torch.where(better, now.to(highest), highest[rows])
            lead = margin(searched.classify(shown), wanted).view(shown.shape[:2])
            far = excess(self.threat, shown, own)
            margins[step, rows], outside[step, rows] = now.to(margins), far.detach().to(margins)
            weight = self.penalty * self.growth ** (step / max(1, self.steps - 1))
            return weight * far + (self.confidence - lead).clamp_min(0)

        descend(searched.begin, searched.parts, loss, self.steps, lr=self.learning_rate)
        return Found(searched, best, highest, {"margin": margins.mean(dim=2), "excess": outside.mean(dim=2)})
