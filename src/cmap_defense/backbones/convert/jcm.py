"""The JAX checkpoints of the CIFAR-10 consistency models (Song et al. 2023, arXiv 2303.01469) as backbones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from cmap_defense.backbones.convert.flax import read_flax
from cmap_defense.backbones.fir import FIRDownConv
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.ncsnpp import Attention, NCSNpp, NCSNppConfig, NoiseEmbedding, ResidualBlock
from cmap_defense.common.modules import building
from cmap_defense.errors import BackboneFileError

FROM_HWIO, FROM_IO, AS_IT_IS = (3, 2, 0, 1), (1, 0), (0,)
"""Order of axes that turns an array of the file into a tensor of the network."""


def convert_jcm(
    path: str | os.PathLike[str], config: NCSNppConfig | None = None, params: str = "params_ema"
) -> ConsistencyBackbone:
    """A backbone from an official checkpoint of the JAX consistency models.

    The file is flax msgpack of about 0.9 GB. Memory holds the chosen weights twice at most, half the file's size.

    Args:
        path: the checkpoint, such as ``checkpoint_80``.
        config: its architecture; None for the CIFAR-10 models'.
        params: entry of the file with the weights: "params_ema", which the official sampler uses, "params", or
            "target_params".

    Returns:
        The backbone in eval mode, float32, on the CPU, its weights needing no gradient.

    Raises:
        BackboneFileError: the file is cut off, is no such checkpoint, or holds another architecture.
        UnknownNameError: the file has no such ``params``.
    """
    config = config or NCSNppConfig()
    with building():
        backbone = ConsistencyBackbone(NCSNpp(config), config.image_shape)
    backbone.eval().requires_grad_(False)
    slots = dict(jcm_slots(backbone.network))
    for name, array in read_flax(path, params).items():
        if name not in slots:
            raise BackboneFileError(f"{path} has {name!r}, which the network of this config has not: {config}.")
        target, axes = slots.pop(name)
        fits = array.ndim == len(axes) and tuple(array.shape[axis] for axis in axes) == target.shape
        if not fits or not np.issubdtype(array.dtype, np.floating):
            raise BackboneFileError(
                f"{path}: {name!r} is {array.dtype} {list(array.shape)}, which does not fit this config: {config}."
            )
        with np.errstate(over="ignore"):
            values = array.transpose(axes).astype(np.float32)
        if not np.isfinite(values).all():
            raise BackboneFileError(f"{path}: {name!r} holds NaN or infinite values (in float32).")
        target.copy_(torch.from_numpy(values))
    if slots:
        raise BackboneFileError(
            f"{path} lacks {len(slots)} of the network's tensors, such as {min(slots)!r}: "
            f"it was trained with another config than {config}."
        )
    return backbone


def jcm_slots(network: nn.Module) -> Iterator[tuple[str, tuple[Tensor, tuple[int, ...]]]]:
    """For every tensor of an NCSN++: its name in the checkpoint, the tensor, and the order of the file's axes for it.

    flax numbers the modules of a class in the order in which they are called, and starts anew inside a block; our
    networks register their modules in that order.
    """
    yield from _slots(network, "", Counter())


_BLOCKS = {ResidualBlock: "ResnetBlockBigGANpp", Attention: "AttnBlockpp", FIRDownConv: "Downsample"}
_LAYERS = {
    nn.Conv2d: ("Conv", "kernel", "bias", FROM_HWIO),
    nn.Linear: ("Dense", "kernel", "bias", FROM_IO),
    nn.GroupNorm: ("GroupNorm", "scale", "bias", AS_IT_IS),
    (FIRDownConv, nn.Conv2d): ("Conv2d", "weight", "bias", FROM_HWIO),
    (Attention, nn.Linear): ("NIN", "W", "b", FROM_IO),
}
"""The layers by class, and by the class of the block that they are in: class in flax, its two tensors, their axes."""


def _slots(module: nn.Module, prefix: str, count: Counter[str]) -> Iterator[tuple[str, tuple[Tensor, tuple[int, ...]]]]:
    def path(kind: str) -> str:
        count[kind] += 1
        return f"{prefix}{kind}_{count[kind] - 1}/"

    for child in module.children():
        layer = _LAYERS.get((type(module), type(child)), _LAYERS.get(type(child)))
        if layer is not None:
            kind, weight, bias, axes = layer
            place, tensors = path(kind), dict(child.named_parameters())
            yield place + weight, (tensors["weight"], axes)
            yield place + bias, (tensors["bias"], AS_IT_IS)
        elif type(child) in _BLOCKS:
            yield from _slots(child, path(_BLOCKS[type(child)]), Counter())
        else:
            if isinstance(child, NoiseEmbedding):
                yield path("GaussianFourierProjection") + "W", (child.get_buffer("frequencies"), AS_IT_IS)
            yield from _slots(child, prefix, count)
