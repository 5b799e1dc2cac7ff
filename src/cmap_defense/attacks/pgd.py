"""Projected gradient descent, with expectation over the model's noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from cmap_defense.attacks.goal import CrossEntropy, Goal, Loss, require_loss
from cmap_defense.attacks.oracle import Feedback, Model, Oracle, differentiates_defence, require_gradient
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.settings import setting
from cmap_defense.gradients import GradientMode


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD(StepAttack):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, section 2.1): ascent on a loss within the ball.

    On a purified classifier the gradient mode decides what the attack is. ``StraightThrough()`` makes it BPDA with EOT
    through the real purification, ``Unrolled()`` follows the exact gradient, ``Implicit()`` and ``Surrogate()`` theirs.
    Further arguments are those of ``StepAttack`` and
    ``Attack``.

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
    loss: Loss = dataclasses.field(default_factory=CrossEntropy)
    gradient: GradientMode | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_loss("PGD", self.loss)
        require_gradient("PGD", self.gradient)

    def differentiates_defence(self, model: Model) -> bool:
        return differentiates_defence(self.gradient, model)

    def predictions_per_image(self) -> int:
        return 1 if self.noise == "known" else self.restarts * self.steps * self.eot

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self.restarts * self.steps * self.eot * model.purifier.passes

    def sweep_attack(self) -> PGD | None:
        return self if self.noise == "fresh" else None

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        oracle = oracle.in_mode(self.gradient, self)
        return (lambda images: oracle.feedback(images, goal, self.loss, self.eot, balanced=self.balanced)), None
