"""Projected steps along a gradient: the loop that attacks on images share, PGD, and SPSA, which needs no gradient."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates, GradientAttack
from cmap_defense.attacks.goal import A_LOSS, CrossEntropy, Goal, Loss, Margin, loss_of
from cmap_defense.attacks.oracle import Feedback, Oracle, by_largest, gradient_length, unit, wide
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.rng import derived_seeds, draw_latents, draw_uniform
from cmap_defense.common.settings import require_number, setting
from cmap_defense.errors import SettingsError
from cmap_defense.threat import ThreatModel, require_linf_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepAttack(Attack):
    """Steps on the image, each projected onto the threat model (Madry et al. 2018, arXiv 1706.06083, section 2.1).

    Its history holds "loss", "gradient_norm" (l2), and "reached", the share of evaluations that reached the goal. It
    warns (``GradientWarning``) of images whose gradient was zero at every step. Further arguments are those of
    ``Attack``.

    Args:
        steps: number of steps.
        step_size: of the first step, in units of images in [0, 1]; None for eps / 4, below which the checks of an
            evaluation call an attack weak.
        schedule: "constant", or "cosine" for a step size that falls to zero along half a cosine.
        random_start: start from a random point of the ball instead of the clean image.
        momentum: decay of the sum of the gradients, each divided by its mean absolute value (mu of Dong et al. 2018,
            arXiv 1710.06081, eq. 6), which averages over noise; 0 for the latest gradient alone.
        sign_steps: take steps along the sign of the gradient in l2 too, as the authors' release of CMAP does.
        keep: "last" for the image after the last step, or "best" for that and the one with the highest loss.
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
        if self.step_size is not None and self.threat.norm == "linf":
            require_linf_size(name, "step_size", self.step_size)
        elif self.step_size is not None:
            require_number(name, "step_size", self.step_size, minimum=0.0)

    def under(self, threat: ThreatModel) -> StepAttack:
        size = self.step_size
        if size is not None:  # it grows with eps
            size = size * threat.eps / self.threat.eps if self.threat.eps else None
            size = min(size, 1.0) if size is not None and threat.norm == "linf" else size
        return dataclasses.replace(self, threat=threat, step_size=size)

    def first_step(self) -> float | None:
        return self._first_size if self.random_start else None

    @property
    def _first_size(self) -> float:
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
            best = torch.where(wide(higher), current, best)
            highest = torch.where(higher, feedback.loss.to(highest), highest)
            rows.append((feedback.loss, gradient_length(feedback.gradient), feedback.reached))
            velocity = self.momentum * velocity + _scaled(feedback.gradient) if self.momentum else feedback.gradient
            direction = velocity.sign() if self.threat.norm == "linf" or self.sign_steps else unit(velocity)
            falling = (1 + math.cos(math.pi * step / self.steps)) / 2
            size = self._first_size * (1 if self.schedule == "constant" else falling)
            current = self.threat.project(current + size * direction, clean).to(clean)
        kept = [current] if self.keep == "last" else [best, current]
        names = ("loss", "gradient_norm", "reached")
        history = {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        return Candidates(torch.stack(kept, dim=1), history)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack, StepAttack):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, section 2.1): ascent on a loss within the ball.

    On a purified classifier the gradient mode decides what the attack is. ``StraightThrough()`` makes it BPDA with EOT
    through the real purification, ``Unrolled()`` follows the exact gradient, ``Implicit()`` and ``Surrogate()`` theirs.
    Further arguments are those of ``StepAttack`` and ``Attack``.

    Args:
        eot: evaluations with independent noise per step, whose gradients are averaged (expectation over transformation;
            Athalye et al. 2018, arXiv 1707.07397, section 2).
        balanced: divide the gradient of each evaluation by its l2 norm before averaging. Through a chaotic loop norms
            differ by orders of magnitude, and the largest would dominate the average.
        loss: the loss to raise: ``CrossEntropy()``, ``Margin()``, or ``VoteMargin()`` for a defence that votes.
        gradient: the gradient mode of a purified classifier during the search; None for its own.

    Raises:
        SettingsError: a value is out of its range.
    """

    eot: int = setting(1, minimum=1)
    balanced: bool = setting(False)
    loss: Loss = setting(CrossEntropy(), like=A_LOSS)

    def predictions_per_image(self) -> int:
        return 1 if self.noise == "known" else self.restarts * self.steps * self.eot

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self.restarts * self.steps * self.eot * model.purifier.passes

    def sweep_attack(self) -> PGD | None:
        return self if self.noise == "fresh" else None

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        oracle = oracle.in_mode(self.gradient, self)
        return (lambda images: oracle.feedback(images, goal, self.loss, self.eot, balanced=self.balanced)), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPSA(StepAttack):
    """Steps along a gradient estimated from pairs of queries (Uesato et al. 2018, arXiv 1802.05666, Algorithm 1).

    Each pair evaluates the model on both sides of the image, along a random direction of +-1 per pixel (Spall 1992). No
    derivative of the model is used, so a misleading gradient does not stop the attack. The noise of a random defence
    adds to that of the estimate. Further arguments are those of ``StepAttack`` and ``Attack``.

    Args:
        pairs: pairs of queries per step.
        common_noise: use the same noise on both sides of a pair, where the model takes seeds. An attacker who runs the
            defence can do that; one with a black box cannot.
        delta: how far each side is from the image, per pixel, in units of images in [0, 1].
        loss: the loss to raise: ``Margin()`` or ``CrossEntropy()``.

    Raises:
        SettingsError: a value is out of its range.
    """

    pairs: int = setting(32, minimum=1)
    common_noise: bool = setting(True)
    delta: float = 0.01
    loss: Loss = setting(Margin(), like="an object: CrossEntropy() or Margin()")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_linf_size("SPSA", "delta", self.delta, minimum=None, above=0.0)
        if self.loss.joint:
            raise SettingsError(f"SPSA.loss must be an object: CrossEntropy() or Margin(), but is {self.loss!r}.")

    def predictions_per_image(self) -> int:
        return 1 if self.noise == "known" else self.restarts * self.steps * 2 * self.pairs

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self.restarts * self.steps * 2 * self.pairs * model.purifier.passes

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        @torch.no_grad()
        def feedback(images: Tensor) -> Feedback:
            slope, (loss, reached) = torch.zeros_like(images), images.new_zeros(2, len(images))
            for _ in range(self.pairs):
                drawn = draw_uniform(derived_seeds(oracle.draws, 0x5B5A + oracle.count), images.shape[1:])
                direction = (drawn < 0.5).to(images) * 2 - 1
                ends = []
                for sign in (1, -1):
                    again = self.common_noise and sign == -1
                    logits = oracle((images + sign * self.delta * direction).clamp(0, 1), again=again)
                    ends.append(loss_of(self.loss, logits[None], goal))
                    reached += goal.reached(logits.argmax(dim=1)) / (2 * self.pairs)
                slope += wide(ends[0] - ends[1]) * direction / (2 * self.delta * self.pairs)
                loss += (ends[0] + ends[1]) / (2 * self.pairs)
            return Feedback(loss, slope, reached)

        return feedback, None


def random_point(threat: ThreatModel, seeds: Tensor, clean: Tensor) -> Tensor:
    """A random image of the threat model: uniform in the ball (linf), or at distance eps in a uniform direction (l2).

    Args:
        threat: the threat model.
        seeds: [B] int64 on the CPU, such as ``oracle.draws``: an image's start depends on its own seed alone.
        clean: [B, C, H, W] in [0, 1].

    Returns:
        [B, C, H, W], allowed by the threat model.
    """
    if threat.norm == "linf":
        noise = 2 * draw_uniform(seeds, clean.shape[1:]) - 1
    else:
        noise = draw_latents(seeds, 1, clean.shape[1:])[:, 0]
        noise = noise / wide(noise.flatten(1).norm(dim=1))
    return threat.project(clean + threat.eps * noise.to(clean), clean)


def _scaled(gradient: Tensor) -> Tensor:
    scaled, _ = by_largest(gradient)
    return scaled / wide(scaled.abs().flatten(1).mean(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny))
