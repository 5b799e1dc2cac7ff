"""Tiny published models: networks, checkpoints in JAX's format, backbone folders, diffusers pipelines."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from cmap_defense.backbones import registry
from cmap_defense.backbones.convert.jcm import jcm_slots
from cmap_defense.backbones.diffusers import build_unet
from cmap_defense.backbones.folder import write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.ncsnpp import NCSNpp, NCSNppConfig
from cmap_defense.backbones.registry import OfficialFile, RegistryEntry
from cmap_defense.backbones.registry.entry import Source
from goldens import flax_bytes, nested
from toys import noise

Network = TypeVar("Network", bound=Any)

CONFIG = NCSNppConfig(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8)
"""The architecture of all tiny models but the pipelines: images [3, 8, 8]."""


def unet_config(size: int | list[int], attended: list[bool], widths: list[int], **more: Any) -> dict[str, Any]:
    """Of a diffusers network like the published ones: residual blocks, some of the sizes with attention."""
    return {
        "sample_size": size,
        "layers_per_block": 1,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "num_class_embeds": None,
    } | more


UNET = unet_config(8, [False, True], [32, 32], attention_head_dim=16, norm_num_groups=8, attn_norm_num_groups=8)


def randomised(network: Network, seed: int = 0) -> Network:
    """The network in eval mode, with weights away from 0 that depend on ``seed`` alone."""
    with torch.no_grad():
        for index, (name, tensor) in enumerate(network.state_dict().items()):
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 10
            tensor.copy_(noise(*tensor.shape, seed=100 * seed + index, dtype=tensor.dtype) / fan_in**0.5)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)
            if name.endswith("frequencies"):
                tensor.mul_(10**0.5 * network.config.fourier_scale)
    return network.eval()


def tiny_backbone(seed: int = 0) -> ConsistencyBackbone:
    """An NCSN++ of ``CONFIG``."""
    with torch.random.fork_rng(devices=[]):
        return ConsistencyBackbone(randomised(NCSNpp(CONFIG), seed), CONFIG.image_shape).eval().requires_grad_(False)


def tiny_folder(folder: Path, seed: int = 0, **described: Any) -> Path:
    """A backbone folder with that model."""
    write_backbone(tiny_backbone(seed), folder, **({"name": "tiny"} | described))
    return folder


def tiny_checkpoint(seed: int = 0, *, pad: int = 0) -> bytes:
    """That model as the JAX code saves it, with ``pad`` bytes of optimiser state at the end."""
    leaves: dict[str, Any] = {"step": np.asarray(3), "lr": 1e-4}
    for name, (tensor, axes) in jcm_slots(tiny_backbone(seed).network):
        leaves[f"params_ema/{name}"] = tensor.permute(tuple(np.argsort(axes).tolist())).contiguous().numpy()
    leaves["opt_state/m"] = np.random.RandomState(seed).randint(0, 256, pad).astype(np.uint8)
    return flax_bytes(nested(leaves))


def tiny_pipeline(folder: Path, seed: int = 0) -> Path:
    """A ConsistencyModelPipeline as the diffusers library saves it, without a record of this package's."""
    with torch.random.fork_rng(devices=[]):
        backbone = ConsistencyBackbone(randomised(build_unet(UNET), seed), (3, 8, 8))
    write_backbone(backbone, folder, name="pipeline")
    (folder / "backbone.json").unlink()
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder, as a repository holds them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fingerprint(model: nn.Module) -> str:
    """Of names and weights: equal for equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tiny_file(url: str, **options: Any) -> OfficialFile:
    """A tiny checkpoint at an address, as a source."""
    return OfficialFile(url=url, **({"config": CONFIG, "about": "0.2 MB"} | options))


def tiny_entry(name: str, *sources: Source, **options: Any) -> RegistryEntry:
    """An entry for tiny models."""
    described: dict[str, Any] = {
        "description": "A tiny model.",
        "image_shape": CONFIG.image_shape,
        "licence": "CC0",
        "paper": "nowhere",
        "settings": {"n_latents": 2, "iterations": 3},
        "quality": {"fid_one_step": 300.0},
    }
    return RegistryEntry(name=name, sources=sources, **(described | options))


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """What is registered meanwhile is forgotten afterwards."""
    entries = registry._entries()
    before = dict(entries)
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)
