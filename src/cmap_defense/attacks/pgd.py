"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, section 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense.attacks.base import Attack, Model
from cmap_defense.errors import GradientError
from cmap_defense.rng import generator_for
from cmap_defense.settings import require_integer, require_number
from cmap_defense.threat import ThreatModel

__all__ = ["PGD"]


class PGD(Attack):
    """Ascent on the cross-entropy by signed (linf) or normalised (l2) gradient steps, projected after each.

    Args:
        threat: the threat model.
        steps: gradient steps, 1 at least.
        step_size: None for a quarter of eps.
        random_start: start from a random point of the ball, drawn on the CPU from ``seed``.
        seed: of the random start.
    """

    def __init__(
        self,
        threat: ThreatModel,
        *,
        steps: int = 20,
        step_size: float | None = None,
        random_start: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(threat)
        self.steps = require_integer("PGD", "steps", steps, minimum=1)
        size = threat.eps / 4 if step_size is None else step_size
        self.step_size = require_number("PGD", "step_size", size, minimum=0.0)
        self.random_start = random_start
        self.seed = seed

    def _run(self, model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        current = self._start(images)
        for _ in range(self.steps):
            with torch.enable_grad():
                leaf = current.detach().requires_grad_()
                loss = F.cross_entropy(model(leaf), labels, reduction="sum")
                if not loss.requires_grad:
                    raise GradientError("PGD needs a gradient, but the model's logits do not depend on the images.")
                (gradient,) = torch.autograd.grad(loss, leaf)
            current = self.threat.project(current + self.step_size * self._direction(gradient), images)
        return current, self.steps

    def _start(self, images: Tensor) -> Tensor:
        if not self.random_start:
            return images
        generator = generator_for(self.seed)
        if self.threat.norm == "linf":
            noise = torch.rand(images.shape, generator=generator, device="cpu") * 2 - 1
        else:
            noise = torch.randn(images.shape, generator=generator, device="cpu")
            noise = noise / noise.flatten(1).norm(dim=1)[:, None, None, None]
        return self.threat.project(images + self.threat.eps * noise.to(images), images)

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.threat.norm == "linf":
            return gradient.sign()
        length = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        return gradient / length[:, None, None, None]
