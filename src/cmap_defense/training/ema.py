"""Averaged weights: those that are kept, and the running average that some objectives take as their target."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmap_defense.training.objectives import Model


class _Average:
    """Averages of a module's parameters and floating-point buffers by name, ``weights``."""

    weights: dict[str, Tensor]

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from saved averages. Raises KeyError when a name is missing."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def _approach(self, module: nn.Module, share: float) -> None:
        """Move every average by ``share`` of its distance to the module's parameter, all in one call."""
        found = _floating(module)
        wide = [found[name].to(average.dtype) for name, average in self.weights.items()]
        torch._foreach_lerp_(list(self.weights.values()), wide, share)  # pyright: ignore[reportPrivateImportUsage]


class EMA(_Average):
    """Exponential moving average of a module's parameters and floating-point buffers, in float32.

    (Karras et al. 2022, appendix F.)
    """

    def __init__(self, module: nn.Module, half_life: int) -> None:
        self.half_life = half_life
        self.weights = {name: tensor.float().clone() for name, tensor in _floating(module).items()}

    def update(self, module: nn.Module, *, batch_size: int, images_seen: int) -> None:
        """Move towards the module's weights after a step on ``batch_size`` images, ``images_seen`` in all."""
        half_life = max(1.0, min(self.half_life, images_seen / 20))
        self._approach(module, 1 - 0.5 ** (batch_size / half_life))

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into the module."""
        for name, tensor in _floating(module).items():
            tensor.copy_(self.weights[name])


class Target(_Average):
    """The model that gives a loss the values to come close to: the trained one itself, or a copy that follows it."""

    def __init__(self, trained: Model, decay: float | None) -> None:
        self.model = trained
        self.weights: dict[str, Tensor] = {}
        if decay is not None:
            self.model = copy.deepcopy(trained).requires_grad_(False)
            self.weights = _floating(self.model)

    def update(self, trained: Model, decay: float | None) -> None:
        """target <- decay target + (1 - decay) trained, after a step."""
        if self.weights:
            self._approach(trained, 1 - (decay or 0.0))


def _floating(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors of a module's state by name; they share its memory."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
