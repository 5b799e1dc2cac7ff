"""How the gradient with respect to the input image is taken.

A purification is an optimisation; what its derivative should be is a choice that decides how strong a gradient attack
is. The choice is an object, handed to ``PurifiedClassifier(gradient=...)``, and never made silently.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from cmap_defense.errors import GradientError

__all__ = ["Detached", "GradientMode", "StraightThrough"]


class GradientMode(abc.ABC):
    """Connects purified images to the images that they were made from."""

    @abc.abstractmethod
    def attach(self, purified: Tensor, images: Tensor) -> Tensor:
        """Purified images with a gradient.

        Args:
            purified: [B, K, C, H, W], without a graph.
            images: [B, C, H, W], the inputs, which may require a gradient.

        Returns:
            [B, K, C, H, W], the same values.
        """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class StraightThrough(GradientMode):
    """Backward pass differentiable approximation (BPDA; Athalye et al. 2018, arXiv 1802.00420, section 4.1.1).

    The derivative of the purification is taken as the identity, for each of the K images; through the log mean
    probability the input receives their weighted average. Costs one classifier backward pass and no backbone pass.
    """

    def attach(self, purified: Tensor, images: Tensor) -> Tensor:
        if not (images.requires_grad and torch.is_grad_enabled()):
            return purified
        carrier = images[:, None]
        return purified + (carrier - carrier.detach()).to(purified.dtype)


class Detached(GradientMode):
    """No gradient: a backward pass that reaches the input raises :class:`~cmap_defense.errors.GradientError`."""

    def attach(self, purified: Tensor, images: Tensor) -> Tensor:
        return _Refuse.apply(purified, images) if images.requires_grad and torch.is_grad_enabled() else purified


class _Refuse(torch.autograd.Function):
    """The first argument; a backward pass to the second is an error."""

    @staticmethod
    def forward(ctx: Any, purified: Tensor, images: Tensor) -> Tensor:
        return purified.view_as(purified)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise GradientError(
            "A gradient with respect to the input was asked for, but this model was made with gradient=Detached(). "
            "Use PurifiedClassifier(..., gradient=StraightThrough()) from cmap_defense.gradients (the default)."
        )
