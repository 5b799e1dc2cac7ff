"""The two images that a consistency loss compares."""

from __future__ import annotations

import torch
from torch import Tensor

from cmap_defense.training.objectives.base import Denoise

__all__ = ["consistency_pair", "noisy_images"]


def noisy_images(images: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """x + sigma z. images, z: [B, C, H, W]. sigma: [B]."""
    return images + sigma[:, None, None, None] * z


def consistency_pair(
    model: Denoise, target: Denoise, noisy: Tensor, t: Tensor, less_noisy: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """f(noisy, t) and f^-(less_noisy, r), [B, C, H, W] each, no gradient through the second.

    Both see the same dropout masks (arXiv 2310.14189, section 3.1): torch's generators, which these are drawn from,
    stand for the second call where they stood for the first, and afterwards where the first one left them.
    """
    device = noisy.device
    cuda = [device] if device.type == "cuda" else []
    cpu_state = torch.random.get_rng_state()
    cuda_states = [torch.cuda.get_rng_state(d) for d in cuda]
    ahead = model(noisy, t)
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.random.set_rng_state(cpu_state)
        for d, state in zip(cuda, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, d)
        behind = target(less_noisy, r)
    return ahead, behind
