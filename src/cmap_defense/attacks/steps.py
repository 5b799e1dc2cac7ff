"""Projected steps along a gradient: the loop that attacks on images share."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import Goal
from cmap_defense.attacks.oracle import Feedback, Oracle, by_largest, gradient_length, unit
from cmap_defense.common.rng import draw_latents, draw_uniform
from cmap_defense.common.settings import require_number, setting
from cmap_defense.threat import ThreatModel, require_linf_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepAttack(Attack):
    """Steps on the image, each projected onto the threat model (Madry et al. 2018, arXiv 1706.06083, section 2.1).

    Args:
        steps: number of steps, at least 1.
        step_size: of the first step, in units of images in [0, 1]; None for eps / 4, below which the checks of an
            evaluation call an attack weak.
        schedule: "constant", or "cosine" for a step size that falls to zero along half a cosine.
        random_start: start from a random point of the ball instead of the clean image.
        momentum: decay of the sum of the gradients, each divided by its mean absolute value (mu of Dong et al. 2018,
            arXiv 1710.06081, eq. 6); 0 for the latest gradient alone. With a random defence it averages over noise at
            no cost.
        sign_steps: take steps along the sign of the gradient in l2 too, as the authors' release of CMAP does.
        keep: "last" for the image after the last step, or "best" for that and the one with the highest loss.

    Its history holds "loss", "gradient_norm" (l2), and "reached", the share of evaluations that reached the goal. It
    warns (``GradientWarning``) of images whose gradient was zero at every step.
    """

    steps: int = setting(20, minimum=1)
    step_size: float | None = None
    schedule: str = setting("constant", choices=("constant", "cosine"))
    random_start: bool = setting(True)
    momentum: float = setting(0.0, minimum=0.0)
    sign_steps: bool = setting(False)
    keep: str = setting("last", choices=("last", "best"))

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.step_size is not None:
            if self.threat.norm == "linf":
                require_linf_size(name, "step_size", self.step_size)
            else:
                require_number(name, "step_size", self.step_size, minimum=0.0)

    def under(self, threat: ThreatModel) -> StepAttack:
        size = self.step_size
        if size is not None:  # it grows with eps
            size = size * threat.eps / self.threat.eps
            size = min(size, 1.0) if threat.norm == "linf" else size
        return dataclasses.replace(self, threat=threat, step_size=size)

    def first_step(self) -> float | None:
        if not self.random_start:
            return None
        return self.threat.eps / 4 if self.step_size is None else self.step_size

    @abc.abstractmethod
    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], Tensor | None]:
        """Prepare the search; the only method that a subclass must implement.

        Args:
            oracle: the model.
            clean: images [B, C, H, W] in [0, 1].
            goal: the true classes, and the targets of a targeted attack.

        Returns:
            A function from images [B, C, H, W] to their loss and gradient, called once per step; and images to start
            from, or None for ``random_start`` to decide.
        """

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        feedback_of, start = self.begin(oracle, clean, goal)
        current = clean if start is None else self.threat.project(start, clean).to(clean)
        if self.random_start and start is None:
            current = random_point(self.threat, oracle.draws, clean)
        velocity = torch.zeros_like(clean)
        best, highest = current, torch.full((len(clean),), -torch.inf, device=clean.device)
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for step in range(self.steps):
            feedback = feedback_of(current)
            higher = feedback.loss > highest
            best = torch.where(_wide(higher), current, best)
            highest = torch.where(higher, feedback.loss.to(highest), highest)
            rows.append((feedback.loss, gradient_length(feedback.gradient), feedback.reached))
            velocity = self.momentum * velocity + _scaled(feedback.gradient) if self.momentum else feedback.gradient
            moved = current + self._size(step) * self._direction(velocity)
            current = self.threat.project(moved, clean).to(clean)
        kept = [current] if self.keep == "last" else [best, current]
        names = ("loss", "gradient_norm", "reached")
        history = {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        return Candidates(torch.stack(kept, dim=1), history)

    def _size(self, step: int) -> float:
        size = self.threat.eps / 4 if self.step_size is None else self.step_size
        return size if self.schedule == "constant" else size * (1 + math.cos(math.pi * step / self.steps)) / 2

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.threat.norm == "linf" or self.sign_steps:
            return gradient.sign()
        return unit(gradient)


def random_point(threat: ThreatModel, seeds: Tensor, clean: Tensor) -> Tensor:
    """A random image of the threat model: uniform in the ball (linf), or at distance eps in a uniform direction (l2).

    ``seeds`` are [B] int64 on the CPU, the clean images [B, C, H, W] in [0, 1].
    """
    if threat.norm == "linf":
        noise = 2 * draw_uniform(seeds, clean.shape[1:]) - 1
    else:
        noise = draw_latents(seeds, 1, clean.shape[1:])[:, 0]
        noise = noise / _wide(noise.flatten(1).norm(dim=1))
    return threat.project(clean + threat.eps * noise.to(clean), clean)


def _scaled(gradient: Tensor) -> Tensor:
    scaled, _ = by_largest(gradient)
    return scaled / _wide(scaled.abs().flatten(1).mean(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny))


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
