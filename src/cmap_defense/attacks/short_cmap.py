"""A short latent loop that starts from the latents of the previous step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from cmap_defense.attacks.goal import Goal, Loss, Margin, require_loss
from cmap_defense.attacks.oracle import Feedback, Model, Oracle, gradient_to, require_gradient
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.cmap.voting import log_mean_probability
from cmap_defense.common.settings import setting
from cmap_defense.gradients import GradientMode, Unrolled


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortCMAP(StepAttack):
    """An attack of this package: PGD whose purifications are few iterations from the latents of the previous step.

    The first latents are those of a whole purification of the start. A few iterations are enough to follow a small
    step of the image, and the gradient through so short a loop is reliable. The model must be a purified classifier.
    Further arguments are those of ``StepAttack``.

    Args:
        iterations: of the latent loop at each step.
        gradient: the gradient mode during the search.
        loss: the loss to raise.
        refresh: steps after which to start again from a whole purification with other noise; None for never.

    Raises:
        SettingsError: a value is out of its range, or the model is something else.
    """

    needs_latents: ClassVar[bool] = True

    iterations: int = setting(10, minimum=1)
    gradient: GradientMode = dataclasses.field(default_factory=Unrolled)
    loss: Loss = dataclasses.field(default_factory=Margin)
    refresh: int | None = setting(None, minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_gradient("ShortCMAP", self.gradient, needed=True)
        require_loss("ShortCMAP", self.loss)

    def differentiates_defence(self, model: Model) -> bool:
        return True

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        whole = oracle.wrapper(self)
        oracle.check_classes(whole, clean)
        short = whole.variant(
            hooks=True, settings=whole.settings.replace(iterations=self.iterations), gradient=self.gradient
        )
        carried: list[Tensor] = []
        steps = 0

        def feedback(images: Tensor) -> Feedback:
            nonlocal steps
            if not carried or (self.refresh is not None and steps % self.refresh == 0):
                with torch.no_grad():
                    carried[:] = [whole.purify(images, seeds=oracle.next_noise()).latents]
            steps += 1
            oracle.next_noise()  # it needs no noise, but counts
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                result = short.purify(leaf, latents=carried[0])
                assert result.logits is not None
                logits = log_mean_probability(result.logits)
                loss = self.loss(logits[None], goal)
                gradient = gradient_to(leaf, loss.sum())
            carried[:] = [result.latents.detach()]
            return Feedback(loss.detach(), gradient, goal.reached(logits.detach().argmax(dim=1)).float())

        return feedback, None
