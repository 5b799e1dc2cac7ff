"""Simultaneous perturbation stochastic approximation: a gradient from queries alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.attacks.goal import Goal, Loss, Margin, require_loss
from cmap_defense.attacks.oracle import Feedback, Oracle
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.rng import derived_seeds, draw_uniform
from cmap_defense.common.settings import setting
from cmap_defense.threat import require_linf_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPSA(StepAttack):
    """Steps along a gradient estimated from pairs of queries (Uesato et al. 2018, arXiv 1802.05666, Algorithm 1).

    Each pair evaluates the model on both sides of the image, along a random direction of +-1 per pixel (Spall 1992). No
    derivative of the model is used, so a misleading gradient does not stop the attack. The noise of a random defence
    adds to that of the estimate. Further arguments are those of ``StepAttack`` and
    ``Attack``.

    Args:
        pairs: pairs of queries per step, at least 1.
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
    loss: Loss = dataclasses.field(default_factory=Margin)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_linf_size("SPSA", "delta", self.delta, minimum=None, above=0.0)
        require_loss("SPSA", self.loss, joint=False)

    def predictions_per_image(self) -> int:
        return 1 if self.noise == "known" else self.restarts * self.steps * 2 * self.pairs

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self.restarts * self.steps * 2 * self.pairs * model.purifier.passes

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        @torch.no_grad()
        def feedback(images: Tensor) -> Feedback:
            slope, loss = torch.zeros_like(images), images.new_zeros(len(images))
            reached = images.new_zeros(len(images))
            for _ in range(self.pairs):
                drawn = draw_uniform(derived_seeds(oracle.draws, 0x5B5A + oracle.count), images.shape[1:])
                direction = (drawn < 0.5).to(images) * 2 - 1
                ends = []
                for sign in (1, -1):
                    again = self.common_noise and sign == -1
                    logits = oracle((images + sign * self.delta * direction).clamp(0, 1), again=again)
                    ends.append(self.loss(logits[None], goal))
                    reached += goal.reached(logits.argmax(dim=1)) / (2 * self.pairs)
                slope += (ends[0] - ends[1])[:, None, None, None] * direction / (2 * self.delta * self.pairs)
                loss += (ends[0] + ends[1]) / (2 * self.pairs)
            return Feedback(loss, slope, reached)

        return feedback, None
