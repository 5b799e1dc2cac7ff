"""One Adam step as a pure function, so that gradients can flow through it (Kingma and Ba 2015, algorithm 1)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.cmap.settings import CMAPSettings


@dataclasses.dataclass(frozen=True)
class AdamState:
    """Steps taken and the running moments of the gradient, shaped like the latents."""

    step: int
    first: Tensor
    second: Tensor

    @classmethod
    def start(cls, latents: Tensor) -> AdamState:
        """The state before the first step."""
        return cls(0, torch.zeros_like(latents), torch.zeros_like(latents))

    def take(self, rows: Tensor) -> AdamState:
        """The state of some images."""
        return AdamState(self.step, self.first[rows], self.second[rows])


def adam_step(latents: Tensor, gradient: Tensor, state: AdamState, settings: CMAPSettings) -> tuple[Tensor, AdamState]:
    """The latents and the state after one step along ``gradient``; nothing is changed in place."""
    beta1, beta2 = settings.betas
    step = state.step + 1
    first = torch.lerp(state.first, gradient, 1 - beta1)
    second = torch.addcmul(beta2 * state.second, gradient, gradient, value=1 - beta2)
    root = second.clamp_min(torch.finfo(second.dtype).tiny).sqrt()  # at 0 the derivative of the root does not exist
    scale = root / (1 - beta2**step) ** 0.5 + settings.eps
    moved = torch.addcdiv(latents, first, scale, value=-settings.rate_at(state.step) / (1 - beta1**step))
    return moved, AdamState(step, first, second)
