"""BPDA that keeps the change made by a purification for many steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.attacks.goal import Goal, Loss, VoteMargin, require_loss
from cmap_defense.attacks.oracle import Feedback, Model, Oracle, gradient_to
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenResidual(StepAttack):
    """Steps on x against C(x + r), with residuals r = G(u*(x)) - x that are found again every few steps.

    The straight-through gradient (BPDA; Athalye et al. 2018, arXiv 1802.00420, section 4.1) treats the purification as
    x plus a constant. So one need not purify at every step: the constants of several purifications are kept and
    attacked together. Steps between purifications cost passes through the classifier alone. The model must be a
    purified classifier. "reached" in its history is the share of C(x + r) that reached the goal. Further arguments are
    those of ``StepAttack``.

    Args:
        every: steps between purifications.
        purifications: purifications with independent noise at a time, with K residuals each.
        memory: the number of latest purifications whose residuals are kept; None for ``purifications``.
        loss: the loss to raise, over all residuals.

    Raises:
        SettingsError: a value is out of its range, or the model is something else.
    """

    steps: int = setting(100, minimum=1)
    every: int = setting(10, minimum=1)
    purifications: int = setting(4, minimum=1)
    memory: int | None = setting(None, minimum=1)
    loss: Loss = dataclasses.field(default_factory=VoteMargin)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_loss("FrozenResidual", self.loss)

    def differentiates_defence(self, model: Model) -> bool:
        return True

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self.restarts * math.ceil(self.steps / self.every) * self.purifications * model.purifier.passes

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        wrapper = oracle.wrapper(self)
        oracle.check_classes(wrapper, clean)
        residuals: list[Tensor] = []
        steps = 0

        def feedback(images: Tensor) -> Feedback:
            nonlocal steps
            if steps % self.every == 0:
                with torch.no_grad():
                    for _ in range(self.purifications):
                        purified = wrapper.purify(images, seeds=oracle.next_noise()).images
                        residuals.append((purified - images[:, None]).transpose(0, 1))
                del residuals[: -(self.memory or self.purifications)]
            steps += 1
            return self._feedback(wrapper, images, torch.cat(residuals), goal)

        return feedback, None

    def _feedback(self, wrapper: PurifiedClassifier, images: Tensor, residuals: Tensor, goal: Goal) -> Feedback:
        """Loss and gradient over all residuals [R, B, C, H, W], ``max_parallel`` images at a time.

        The logits of all come first, then the gradient of the loss to them is taken back to the images.
        """
        size = wrapper.max_parallel or 256
        owners = torch.arange(len(images), device=images.device).repeat(len(residuals))
        pairs = list(zip(owners.split(size), residuals.flatten(0, 1).split(size), strict=True))
        with torch.no_grad():
            found = torch.cat([wrapper.undefended(images[own] + part, check=False) for own, part in pairs])
        with torch.enable_grad():
            logits = found.unflatten(0, residuals.shape[:2]).requires_grad_()
            loss = self.loss(logits, goal)
            (pull,) = torch.autograd.grad(loss.sum(), logits)
            gradient = torch.zeros_like(images)
            for (own, part), weight in zip(pairs, pull.flatten(0, 1).split(size), strict=True):
                leaf = images[own].requires_grad_()
                pulled = (wrapper.undefended(leaf + part, check=False) * weight).sum()
                gradient.index_add_(0, own, gradient_to(leaf, pulled))
        return Feedback(loss.detach(), gradient, goal.reached(logits.detach().argmax(dim=2)).float().mean(dim=0))
