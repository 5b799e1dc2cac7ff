"""Steps on the image against the purification's own parts: short loops, a target on the manifold, frozen residuals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from cmap_defense.attacks.base import A_MODE, WRAPPER, missing_for
from cmap_defense.attacks.goal import A_LOSS, Goal, Loss, Margin, VoteMargin, loss_of
from cmap_defense.attacks.latents import LatentAttack
from cmap_defense.attacks.oracle import Feedback, Model, Oracle, finite_rows, raw_gradient
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cmap.voting import log_mean_probability
from cmap_defense.common.settings import setting
from cmap_defense.gradients import GradientMode, Unrolled
from cmap_defense.threat import ThreatModel


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
    gradient: GradientMode = setting(Unrolled(), like=A_MODE)
    loss: Loss = setting(Margin(), like=A_LOSS)
    refresh: int | None = setting(None, minimum=1)

    def differentiates_defence(self, model: Model) -> bool:
        return self.gradient.differentiates_defence

    def missing(self, model: Model) -> str | None:
        return super().missing(model) or missing_for(self.gradient, model)

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        whole = oracle.wrapper(self, clean)
        settings = whole.settings.replace(iterations=self.iterations)
        short = whole.variant(hooks=True, settings=settings, gradient=self.gradient)
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
                loss = loss_of(self.loss, logits[None], goal)
                gradient = oracle.gradient_to(leaf, loss.sum())
            carried[:] = [result.latents.detach()]
            return Feedback(loss.detach(), gradient, goal.reached(logits.detach().argmax(dim=1)).float())

        return feedback, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSteer(StepAttack):
    """An attack of this package: move the image until its purification ends at a misclassified image G(u_t)

        max_x  - (1/K) sum_k ||G(u_k*(x)) - G(u_t)||^2

    G(u_t) is the best attempt of a ``LatentAttack``, and the search starts from it. The loss is a distance of images,
    with a slope where the classifier's loss is flat. The model must be a purified classifier. Further arguments are
    those of ``StepAttack``.

    Args:
        target: the attack that finds G(u_t), within its own threat model; None for one with its defaults and this
            threat model. Its restarts, seed and noise are not used.
        gradient: the gradient mode during the search.

    Raises:
        SettingsError: a value is out of its range, or the model is something else.
    """

    needs_latents: ClassVar[bool] = True

    target: LatentAttack | None = setting(None, like="a LatentAttack")
    gradient: GradientMode = setting(Unrolled(last=5), like=A_MODE)

    def differentiates_defence(self, model: Model) -> bool:
        return self.gradient.differentiates_defence

    def missing(self, model: Model) -> str | None:
        return super().missing(model) or missing_for(self.gradient, model)

    def under(self, threat: ThreatModel) -> TargetSteer:
        moved = super().under(threat)
        assert isinstance(moved, TargetSteer)
        return moved if self.target is None else dataclasses.replace(moved, target=self.target.under(threat))

    def first_step(self) -> None:
        return None  # the search starts from the target

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], Tensor | None]:
        wrapper = oracle.wrapper(self).variant(hooks=True, gradient=self.gradient)
        _, images, margins, _ = (self.target or LatentAttack(self.threat)).search(oracle, clean, goal)
        target = images[torch.arange(len(clean), device=clean.device), margins.argmax(dim=1)]

        def feedback(images: Tensor) -> Feedback:
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                result = wrapper.purify(leaf, seeds=oracle.next_noise())
                distance = (result.images - target[:, None]).square().flatten(2).sum(dim=2).mean(dim=1)
                gradient = oracle.gradient_to(leaf, distance.sum())
            assert result.labels is not None
            return Feedback(-distance.detach(), -gradient, goal.reached(result.labels).float())

        return feedback, target


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
    loss: Loss = setting(VoteMargin(), like=A_LOSS)

    def missing(self, model: Model) -> str | None:
        return super().missing(model) or (None if isinstance(model, PurifiedClassifier) else WRAPPER)

    def differentiates_defence(self, model: Model) -> bool:
        return True

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self.restarts * math.ceil(self.steps / self.every) * self.purifications * model.purifier.passes

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], None]:
        wrapper = oracle.wrapper(self, clean)
        residuals: list[Tensor] = []
        steps = 0

        def feedback_of(images: Tensor) -> Feedback:
            nonlocal steps
            if steps % self.every == 0:
                with torch.no_grad():
                    for _ in range(self.purifications):
                        purified = wrapper.purify(images, seeds=oracle.next_noise()).images
                        residuals.append((purified - images[:, None]).transpose(0, 1))
                    del residuals[: -(self.memory or self.purifications)]
            steps += 1
            feedback, finite = self._feedback(wrapper, images, torch.cat(residuals), goal)
            oracle.finite.append(finite)
            return feedback

        return feedback_of, None

    def _feedback(
        self, wrapper: PurifiedClassifier, images: Tensor, residuals: Tensor, goal: Goal
    ) -> tuple[Feedback, Tensor]:
        """Loss and gradient over all residuals [R, B, C, H, W], ``max_parallel`` images at a time; and for which images
        [B] all gradients were finite.

        The logits of all come first, then the gradient of the loss to them is taken back to the images.
        """
        size = wrapper.max_parallel or 256
        owners = torch.arange(len(images), device=images.device).repeat(len(residuals))
        pairs = list(zip(owners.split(size), residuals.flatten(0, 1).split(size), strict=True))
        with torch.no_grad():
            found = torch.cat([wrapper.undefended(images[own] + part, check=False) for own, part in pairs])
        with torch.enable_grad():
            logits = found.unflatten(0, residuals.shape[:2]).requires_grad_()
            loss = loss_of(self.loss, logits, goal)
            (pull,) = torch.autograd.grad(loss.sum(), logits)
            gradient, finite = torch.zeros_like(images), torch.ones_like(goal.labels, dtype=torch.bool)
            for (own, part), weight in zip(pairs, pull.flatten(0, 1).split(size), strict=True):
                leaf = images[own].requires_grad_()
                pulled = (wrapper.undefended(leaf + part, check=False) * weight).sum()
                found, own_finite = finite_rows(raw_gradient(leaf, pulled))
                gradient.index_add_(0, own, found)
                finite[own[~own_finite]] = False
        reached = goal.reached(logits.detach().argmax(dim=2)).float().mean(dim=0)
        return Feedback(loss.detach(), gradient, reached), finite
