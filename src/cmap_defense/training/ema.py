"""Averaged weights: those that are kept, and the running average that some objectives take as their target."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cmap_defense.training.models import Model

__all__ = ["EMA", "Target"]


class EMA:
    """Exponential moving average of a module's parameters, in float32; half-life in images (Karras et al. 2022,
    appendix F).

    weights: name -> average. They start as the module's weights at construction.
    """

    def __init__(self, module: nn.Module, half_life: int) -> None:
        self.half_life = half_life
        self.weights = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    def update(self, module: nn.Module, *, batch_size: int, images_seen: int) -> None:
        """Move towards the module's weights after a step on ``batch_size`` images, ``images_seen`` in all."""
        half_life = max(1.0, min(self.half_life, images_seen / 20))
        _approach(self.weights, module, 1 - 0.5 ** (batch_size / half_life))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Continue from saved averages. Raises KeyError when a name is missing."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into the module's parameters."""
        for name, p in module.named_parameters():
            p.copy_(self.weights[name])


class Target:
    """The model that gives a loss the values to come close to: the trained one itself, or a copy that follows it.

    Args:
        trained: what is trained.
        decay: of the copy at the start, as :meth:`Objective.target_decay
            <cmap_defense.training.objectives.base.Objective.target_decay>` gives it; None for the trained model itself.

    model: to be called; it is in the trained one's mode. weights: name -> average, of the copy; empty where there is
    none.
    """

    def __init__(self, trained: Model, decay: float | None) -> None:
        self.model = trained
        self.weights: dict[str, Tensor] = {}
        if decay is not None:
            self.model = copy.deepcopy(trained).requires_grad_(False)
            self.weights = {name: p.detach() for name, p in self.model.named_parameters()}

    def update(self, trained: Model, decay: float | None) -> None:
        """target <- decay target + (1 - decay) trained, after a step."""
        if self.weights:
            _approach(self.weights, trained, 1 - (decay or 0.0))

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Continue from saved averages. Raises KeyError when a name is missing."""
        for name, average in self.weights.items():
            average.copy_(weights[name])


@torch.no_grad()
def _approach(averages: dict[str, Tensor], module: nn.Module, share: float) -> None:
    """Move every average by ``share`` of its way to the module's parameter of that name, all in one call."""
    found = {name: p.detach() for name, p in module.named_parameters()}
    own = list(averages.values())
    wide = [found[name].to(average.dtype) for name, average in averages.items()]
    torch._foreach_lerp_(own, wide, share)  # pyright: ignore[reportPrivateImportUsage] - one launch for all
