"""How many latents fit at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["bytes_per_latent", "default_max_parallel"]

SHARE_OF_FREE_MEMORY = 0.6
CPU_BUDGET = 2 * 2**30
"""On a CPU free memory says little; chunks stay within 2 GiB, which costs no speed."""
WORKSPACE = 2.0
"""Gradients and workspace of the backward pass, relative to what the forward pass keeps for it."""


def bytes_per_latent(generate: Callable[[Tensor], Tensor], image_shape: Sequence[int], device: torch.device) -> int:
    """Memory that one latent takes in forward and backward, from what autograd keeps in one forward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    latent = torch.zeros((1, *image_shape), device=device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        generate(latent)
    return int(WORKSPACE * (sum(kept.values()) + latent.numel() * latent.element_size()))


def default_max_parallel(generate: Callable[[Tensor], Tensor], image_shape: Sequence[int], device: torch.device) -> int:
    """Latents that fit into the free memory of a CUDA device, or into a fixed budget elsewhere; 1 at least."""
    budget = CPU_BUDGET
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = int(SHARE_OF_FREE_MEMORY * (free + unused))
    return max(1, budget // bytes_per_latent(generate, image_shape, device))
