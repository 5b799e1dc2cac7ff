"""One purification, ready to be run: where the plain loop, gradients through it and attacks on latents start from."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cmap_defense.cmap.objective import LatentObjective
from cmap_defense.cmap.optimise import Callback, history_of, minimise
from cmap_defense.cmap.stopping import Predict
from cmap_defense.cmap.unroll import Backward, generate_with_gradient, unrolled_latents
from cmap_defense.errors import BackboneError, GradientError
from cmap_defense.results import History, PurificationResult

RANGE_TOLERANCE = 1e-2
"""How far outside [-1, 1] a backbone's images may be, for the rounding of half precision."""


class _Once(torch.autograd.Function):
    """The images; a gradient to them cannot be differentiated again, and says so."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _RefuseTwice.apply(cotangents[0], *ctx.saved_tensors)


class _RefuseTwice(torch.autograd.Function):
    """A gradient that depends on the images; a backward pass through it is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, images: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise GradientError(
            "Second derivatives through the optimisation over latents are not there: take differences of gradients, or "
            "gradient=StraightThrough() or Surrogate(), which are differentiable twice."
        )


def differentiable_once(images: Tensor) -> Tensor:
    """The images, with a gradient whose own gradient is an error; without one as they are."""
    return _Once.apply(images) if images.requires_grad and torch.is_grad_enabled() else images


@dataclasses.dataclass(frozen=True)
class LatentProblem:
    """What there is to minimise, and from where.

    Attributes:
        objective: eq. 9 of the images.
        images: [B, C, H, W] in [0, 1], in the loop's precision, with the graph that they came with.
        start: [B, K, C, H, W], the initial latents.
        seeds: [B], what they were drawn from; None when they were given.
        predict: images to labels, where an image stops by these.
    """

    objective: LatentObjective
    images: Tensor
    start: Tensor
    seeds: Tensor | None = None
    predict: Predict | None = None

    def solve(self, callback: Callback | None = None) -> PurificationResult:
        """The loop as it is, without a graph."""
        with torch.autocast(self.start.device.type, enabled=False):  # the backbone alone gets the caller's autocast
            found, history = minimise(self.objective, self.start, callback=callback, predict=self.predict)
            return self.result(found, self.objective.images_of(found), history)

    def generate(self, latents: Tensor) -> Tensor:
        """The images [B, K, C, H, W] in [-1, 1] of latents, differentiable once in both latents and ``images``."""
        return generate_with_gradient(self.objective, latents, self.images)

    def unrolled(self, backward: Backward, **hooks: Any) -> PurificationResult:
        """The same with a gradient to the images, taken as ``backward`` says; hooks as for ``unrolled_latents``."""
        objective, rows = self.objective, []
        options: dict[str, Any] = {"backward": backward, "rows": rows, "predict": self.predict, **hooks}
        with torch.autocast(self.start.device.type, enabled=False):
            latents = unrolled_latents(objective, self.images, self.start, **options)
            history = history_of(rows, latents.detach(), objective.settings)
            return self.result(latents, self.generate(latents), history)

    def result(self, latents: Tensor, generated: Tensor, history: History) -> PurificationResult:
        """The result for found latents and their images [B, K, C, H, W] in [-1, 1], with whatever graph they have.

        Raises:
            BackboneError: the images are outside [-1, 1].
        """
        if generated.numel() and generated.detach().abs().max() > 1 + RANGE_TOLERANCE:
            raise BackboneError(
                f"The backbone must return images in [-1, 1], but their largest magnitude is "
                f"{generated.detach().abs().max().item():.4g}."
            )
        images = (generated.clamp(-1, 1) + 1) / 2
        iterations = (~history.total.isnan()).sum(dim=0).cpu()
        return PurificationResult(
            images,
            latents,
            history,
            self.seeds,
            self.objective.class_labels,
            iterations=iterations,
            passes=latents.shape[1] * (iterations + 1) if self.objective.settings.stops else None,
        )
