"""No gradient, and an error where one is requested."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cmap_defense.errors import GradientError
from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.results import PurificationResult


class Detached(GradientMode):
    """No gradient: a backward pass that reaches the input raises ``GradientError``."""

    differentiates_defence = False

    def purify(self, purification: Purification) -> PurificationResult:
        result = purification.run()
        if not purification.wants_gradient:
            return result
        return dataclasses.replace(result, images=_Refuse.apply(result.images, purification.images))


class _Refuse(torch.autograd.Function):
    """The first argument; a backward pass to the second is an error."""

    @staticmethod
    def forward(ctx: Any, purified: Tensor, images: Tensor) -> Tensor:
        return purified.view_as(purified)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise GradientError(
            "A gradient with respect to the input is needed, but this model was made with gradient=Detached(). "
            "Leave gradient out, or use another of cmap_defense.gradients: Unrolled(), StraightThrough(), Implicit(), "
            "Surrogate()."
        )
