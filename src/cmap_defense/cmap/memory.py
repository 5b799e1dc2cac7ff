"""How many latents fit at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.common.modules import dtype_of
from cmap_defense.common.passes import not_counting

SHARE_OF_FREE_MEMORY = 0.6
CPU_BUDGET = 2 * 2**30
"""On a CPU free memory says little; chunks stay within 2 GiB, which costs no speed."""
_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()
"""Bytes per latent of modules, by what they depend on."""
WORKSPACE = 2.0
"""Gradients and workspace of the backward pass, relative to what the forward pass keeps for it."""


def bytes_per_latent(
    generate: Callable[..., Tensor], image_shape: Sequence[int], device: torch.device, *, conditional: bool = False
) -> int:
    """Memory that one more latent takes in forward and backward, from what autograd keeps for three and for two.

    The difference leaves out the weights, of which autograd keeps views and casts. The losses and Adam take little
    besides. Arguments as for ``default_max_parallel``.
    """
    kept = [_kept_bytes(generate, torch.zeros((n, *image_shape), device=device), conditional) for n in (2, 3)]
    return max(1, int(WORKSPACE * (kept[1] - kept[0])))


def _kept_bytes(generate: Callable[..., Tensor], latents: Tensor, conditional: bool) -> int:
    """Bytes of all storages that autograd keeps for the backward pass of ``generate(latents)``."""
    storages: dict[int, int] = {}
    labels = (torch.zeros(len(latents), dtype=torch.int64, device=latents.device),) if conditional else ()

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output that is kept as it is would keep its graph, which keeps it: for ever

    with not_counting(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        generated = generate(
            latents.requires_grad_(), *labels
        )  # kept until it is counted, so that no storage is used twice
    del generated
    return sum(storages.values()) + latents.untyped_storage().nbytes()


def default_max_parallel(
    generate: Callable[..., Tensor],
    image_shape: Sequence[int],
    device: torch.device,
    *,
    conditional: bool = False,
    owner: nn.Module | None = None,
) -> int:
    """Latents that fit into the free memory of a CUDA device, or into a fixed budget elsewhere; 1 at least.

    Args:
        generate: the network, latents [B, C, H, W] to images.
        image_shape: (C, H, W).
        device: where it is.
        conditional: ``generate`` takes class labels as well.
        owner: the module that ``generate`` runs, for which a latent's memory is then measured once.
    """
    budget = CPU_BUDGET
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = int(SHARE_OF_FREE_MEMORY * (free + unused))
    known = {} if owner is None else _MEASURED.setdefault(owner, {})
    place = (tuple(image_shape), str(device), dtype_of(owner), torch.is_autocast_enabled(device.type), conditional)
    if place not in known:
        known[place] = bytes_per_latent(generate, image_shape, device, conditional=conditional)
    return max(1, budget // known[place])
