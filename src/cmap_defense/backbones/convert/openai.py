"""OpenAI's PyTorch files of the ImageNet-64 and LSUN-256 models (``cd_imagenet64_l2.pt``, ...) as diffusers' networks.

Both are the U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233); the names of the tensors differ, and the query, key
and value projections of an attention are one tensor in OpenAI's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones.diffusers import build_unet, openai_unet
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.weights import first_difference, read_pickle
from cmap_defense.common.modules import building
from cmap_defense.common.settings import require_integer
from cmap_defense.errors import BackboneFileError, SettingsError

State = dict[str, Tensor]

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def convert_openai(
    path: str | os.PathLike[str], *, image_size: int | None = None, head_channels: int = 64
) -> ConsistencyBackbone:
    """A backbone from one of OpenAI's ``.pt`` files of consistency models; needs the diffusers library.

    Widths, levels, blocks, attention and classes are read off the tensors; the two options are not in them.

    Args:
        path: the file; only tensors of it are read, never code.
        image_size: side of the images; None to read it off the file's name ("...64...", "...256...").
        head_channels: channels of one attention head; the published models have 64.

    Returns:
        The backbone in eval mode, float32, on the CPU, its weights needing no gradient.

    Raises:
        BackboneFileError: the file is cut off, hostile, or no such U-Net.
        SettingsError: the image size is not known, or does not fit.
        MissingExtraError: the diffusers library is not installed.
    """
    path = Path(path)
    require_integer("convert_openai", "head_channels", head_channels, minimum=1)
    if image_size is None:
        named = re.search(r"(?<!\d)(32|64|128|256)(?!\d)", path.name)
        if named is None:
            raise SettingsError(f"The side of the images is not in {path.name!r}: give image_size (--image-size).")
        image_size = int(named[1])
    require_integer("convert_openai", "image_size", image_size, minimum=1)
    state = read_pickle(path)
    unfit = [name for name, t in state.items() if t.layout != torch.strided or not t.is_floating_point()]
    if unfit:
        raise BackboneFileError(
            f"{path}: {unfit[0]!r} is no dense floating-point tensor: this is no U-Net of OpenAI's."
        )
    try:
        config = _configuration(state, image_size, head_channels)
        renamed = _renamed(state, len(config["block_out_channels"]), config["layers_per_block"])
        _require_fitting(config, image_size, head_channels)
        network = build_unet(config)
        wrong = first_difference(network.unet, renamed)
        if wrong is not None:
            raise ValueError(wrong)
        if state:
            raise ValueError(f"it has {len(state)} tensor(s) besides, such as {min(state)!r}")
    except SettingsError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise BackboneFileError(
            f"{path} is not a U-Net of OpenAI's consistency models ({type(error).__name__}: {error})."
        ) from error
    broken = [name for name, t in renamed.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise BackboneFileError(f"{path}: {broken[0]!r} holds NaN or infinite values.")
    with building():
        network.unet.load_state_dict(renamed)
        shape = (config["in_channels"], image_size, image_size)
        backbone = ConsistencyBackbone(network, shape, num_classes=config["num_class_embeds"])
    return backbone.float().eval().requires_grad_(False)


def _require_fitting(config: dict[str, Any], image_size: int, head_channels: int) -> None:
    channels, unit = config["block_out_channels"], 2 ** (len(config["block_out_channels"]) - 1)
    if image_size % unit:
        raise SettingsError(f"image_size must be a multiple of {unit} for this file's levels, but is {image_size}.")
    attended = {c for c, kind in zip(channels, config["down_block_types"], strict=True) if kind.startswith("Attn")}
    for width in sorted(attended | {channels[-1]}):
        if width % head_channels:
            raise SettingsError(f"head_channels must divide an attention's {width} channels, but is {head_channels}.")


def _configuration(state: State, image_size: int, head_channels: int) -> dict[str, Any]:
    """The UNet2DModel that these tensors make up.

    A block that doubles the resolution stands last in its list, and its level ends there; so the blocks of the way up
    tell how many blocks a level has.
    """
    inputs, outputs = _blocks(state, "input_blocks"), _blocks(state, "output_blocks")
    grows = [i for i, parts in enumerate(outputs) if "in_layers.2.weight" in parts[-1] and len(parts) > 1]
    per_level = grows[0] + 1 if grows else len(outputs)
    levels, rest = divmod(len(outputs), per_level)
    if rest or len(grows) != levels - 1 or len(inputs) != len(outputs) or per_level < 2:
        raise ValueError(f"{len(inputs)} and {len(outputs)} blocks do not divide into levels")
    firsts = [inputs[1 + level * per_level] for level in range(levels)]
    attended = [len(parts) > 1 for parts in firsts]
    embedding, width = state["input_blocks.1.0.emb_layers.1.weight"], firsts[0][0]["in_layers.2.weight"]
    labels = state.get("label_emb.weight")
    config = openai_unet(
        (state["input_blocks.0.0.weight"].shape[1], image_size, image_size),
        [parts[0]["in_layers.2.weight"].shape[0] for parts in firsts],
        attended,
        layers_per_block=per_level - 1,
        attention_head_dim=head_channels,
        num_class_embeds=None if labels is None else labels.shape[0],
    )
    shifted = embedding.shape[0] == 2 * width.shape[0]
    return config | {
        "out_channels": state["out.2.weight"].shape[0],
        "resnet_time_scale_shift": "scale_shift" if shifted else "default",
    }


def _blocks(state: State, side: str) -> list[list[State]]:
    """The blocks of one side: for each its parts, and of each part the tensors by their names in it."""
    blocks: dict[int, dict[int, State]] = {}
    for key, tensor in state.items():
        if key.startswith(f"{side}."):
            block, part, inner = key.removeprefix(f"{side}.").split(".", 2)
            blocks.setdefault(int(block), {}).setdefault(int(part), {})[inner] = tensor
    return [[parts[i] for i in range(len(parts))] for parts in (blocks[i] for i in range(len(blocks)))]


def _renamed(state: State, levels: int, layers: int) -> State:
    """The tensors under the names, and in the shapes, of a UNet2DModel; they are taken out of ``state``."""
    residual = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attention = {"middle_block.1": "mid_block.attentions.0"}
    for level in range(levels):
        for side, ours, count in (("input", "down", layers), ("output", "up", layers + 1)):
            first = level * (layers + 1) + (side == "input")
            attended = f"{side}_blocks.{first}.1.qkv.weight" in state
            for i in range(count):
                residual[f"{side}_blocks.{first + i}.0"] = f"{ours}_blocks.{level}.resnets.{i}"
                if attended:
                    attention[f"{side}_blocks.{first + i}.1"] = f"{ours}_blocks.{level}.attentions.{i}"
            if level < levels - 1:
                part = 0 if side == "input" else 1 + attended
                residual[f"{side}_blocks.{first + layers}.{part}"] = f"{ours}_blocks.{level}.{ours}samplers.0"
    names = _ENDS | {f"{theirs}.norm": f"{ours}.group_norm" for theirs, ours in attention.items()}
    for theirs, ours in residual.items():
        names |= {f"{theirs}.{inner}": f"{ours}.{name}" for inner, name in _RESIDUAL.items()}
    leaves = [(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in names.items() for leaf in ("weight", "bias")]
    renamed = {ours: state.pop(theirs) for theirs, ours in leaves if theirs in state}
    for theirs, ours in attention.items():
        for leaf in ("weight", "bias"):
            projections = (*state.pop(f"{theirs}.qkv.{leaf}").chunk(3), state.pop(f"{theirs}.proj_out.{leaf}"))
            for name, part in zip(("to_q", "to_k", "to_v", "to_out.0"), projections, strict=True):
                renamed[f"{ours}.{name}.{leaf}"] = part.flatten(1) if part.ndim > 1 else part  # 1x1 convolutions
    return renamed
