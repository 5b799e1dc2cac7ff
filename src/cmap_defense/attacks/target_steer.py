"""Steering the latent loop towards a misclassified image that was found before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.attacks.goal import Goal
from cmap_defense.attacks.latent import LatentAttack
from cmap_defense.attacks.oracle import Feedback, Model, Oracle, gradient_to, require_gradient
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import GradientMode, Unrolled


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSteer(StepAttack):
    """An attack of this package: move the image until its purification ends at a misclassified image G(u_t)

        max_x  - (1/K) sum_k ||G(u_k*(x)) - G(u_t)||^2  - the same at each of the last ``watched`` iterations

    G(u_t) is the best attempt of a ``LatentAttack``, and the search starts from it.
    The loss is a distance of images, with a slope where the classifier's loss is flat. The model must be a purified
    classifier. Further arguments are those of ``StepAttack``.

    Args:
        target: the attack that finds G(u_t), within its own threat model; None for one with its defaults and this
            threat model. Its restarts, seed and noise are not used.
        gradient: the gradient mode during the search.
        watched: iterations before the last whose generated images count with the same weight. It needs an unrolled
            gradient that reaches them.

    Raises:
        SettingsError: a value is out of its range, or the model is something else.
    """

    needs_latents: ClassVar[bool] = True

    target: LatentAttack | None = None
    gradient: GradientMode = dataclasses.field(default_factory=lambda: Unrolled(last=5))
    watched: int = setting(0, minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and not isinstance(self.target, LatentAttack):
            raise SettingsError(f"TargetSteer.target must be a LatentAttack, but is {self.target!r}.")
        require_gradient("TargetSteer", self.gradient, needed=True)
        if self.watched and not isinstance(self.gradient, Unrolled):
            raise SettingsError("TargetSteer.watched needs gradient=Unrolled(): no other reaches the iterations.")

    def differentiates_defence(self, model: Model) -> bool:
        return True

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Callable[[Tensor], Feedback], Tensor | None]:
        wrapper = oracle.wrapper(self).variant(hooks=True, gradient=self.gradient)
        found = (self.target or LatentAttack(self.threat)).search(oracle, clean, goal)
        rows = torch.arange(len(clean), device=clean.device)
        target = found.images[rows, found.margins.argmax(dim=1)]
        small = 2 * wrapper.preprocessing.resized(target, wrapper.image_shape[1:])[:, None] - 1
        iterations = wrapper.settings.iterations
        late = range(max(0, iterations - self.watched), iterations)
        on_the_way: list[Tensor] = []

        def watch(state: Any) -> None:
            running = state.image_indices.to(small.device)  # those that have not stopped early
            distance = (state.generated - small[running]).square().flatten(2).sum(dim=2).mean(dim=1) / 4
            on_the_way.append(distance.new_zeros(len(small)).index_add(0, running, distance))

        def feedback(images: Tensor) -> Feedback:
            on_the_way.clear()
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                if self.watched:
                    with wrapper.register_latent_hook(watch, iterations=late, live=True):
                        result = wrapper.purify(leaf, seeds=oracle.next_noise())
                else:
                    result = wrapper.purify(leaf, seeds=oracle.next_noise())
                distance = (result.images - target[:, None]).square().flatten(2).sum(dim=2).mean(dim=1)
                distance = torch.stack([distance, *on_the_way]).sum(dim=0)
                gradient = gradient_to(leaf, distance.sum())
            assert result.labels is not None
            return Feedback(-distance.detach(), -gradient, goal.reached(result.labels).float())

        return feedback, target
