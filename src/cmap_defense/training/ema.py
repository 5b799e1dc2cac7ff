"""Averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """Exponential moving average of a module's parameters, in float32; half-life in images (Karras et al. 2022,
    appendix F).

    weights: name -> average. They start as the module's weights at construction.
    """

    def __init__(self, module: nn.Module, half_life: int) -> None:
        self.half_life = half_life
        self.weights = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, *, batch_size: int, images_seen: int) -> None:
        """Move towards the module's weights after a step on ``batch_size`` images, ``images_seen`` in all."""
        half_life = max(1.0, min(self.half_life, images_seen / 20))
        keep = 0.5 ** (batch_size / half_life)
        for name, p in module.named_parameters():
            self.weights[name].lerp_(p.detach().float(), 1 - keep)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Continue from saved averages. Raises KeyError when a name is missing."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into the module's parameters."""
        for name, p in module.named_parameters():
            p.copy_(self.weights[name])
