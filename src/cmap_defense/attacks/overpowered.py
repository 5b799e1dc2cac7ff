"""Pairs of generated images on both sides of the decision boundary, in one ball."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.attacks.base import Candidates
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.latents import LatentSearch, descend, excess, project_all
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overpowered(LatentSearch):
    """The overpowered attack (Jalal et al. 2017, arXiv 1712.09196), within the ball around an image x

        min_{u, u'}  penalty [ excess(G(u), x) + excess(G(u'), x) + excess(G(u), G(u')) ]
                     + max(confidence - lead(G(u)), 0) + max(confidence - margin(G(u')), 0)

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
        own = super().passes_per_image(model)
        return own + self.restarts * self.latents * (self.steps + 2)

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

        latents = descend(searched.begin, searched.parts, loss, self.steps, lr=self.learning_rate)
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
