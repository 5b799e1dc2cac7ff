"""Consistency models in the layout of the diffusers library: a UNet2DModel beside a CMStochasticIterativeScheduler.

    model_index.json
    scheduler/scheduler_config.json
    unet/config.json
    unet/diffusion_pytorch_model.safetensors

The weights may be in shards or in a variant too, see ``WEIGHTS``. The library builds the network; it is the extra
``[diffusers]`` and is imported when it is needed. The network inside is used bare: the library's scheduler rounds time
steps and clips with no way around it.
"""

from __future__ import annotations

import abc
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cmap_defense.backbones.karras import ConsistencyBackbone, KarrasModel, NoiseRange, boundary_scalings
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.weights import load_weights, read_weights
from cmap_defense.common.modules import building
from cmap_defense.common.optional import optional_import
from cmap_defense.errors import BackboneFileError, SettingsError

INDEX, UNET_CONFIG, SCHEDULER_CONFIG = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
PIPELINE_FILES = (INDEX, UNET_CONFIG, SCHEDULER_CONFIG)

_VARIANTS = {"": "float32", ".fp16": "float16", ".bf16": "bfloat16"}
"""Variants by their part of the file name, with the precision that they are saved in."""

_STEM = "unet/diffusion_pytorch_model"

WEIGHTS = {
    name: dtype
    for variant, dtype in _VARIANTS.items()
    for suffix in ("safetensors", "bin")
    for name in (f"{_STEM}{variant}.{suffix}", f"{_STEM}.{suffix}.index{variant}.json")
}
"""The weights of a pipeline with the precision that they are saved in, in order of preference: full precision before a
variant, safetensors before a pickle (of which tensors alone are read), one file before an index of shards."""

_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What versions of the library before 0.17 called the layers of an attention."""


class PipelineUNet(nn.Module, abc.ABC):
    """F(x, noise_level, class_labels): a UNet2DModel that gets the time as in its training."""

    network_name: ClassVar[str]

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        attention = _library().models.attention_processor.Attention
        for module in unet.modules():
            if isinstance(module, attention):
                processed: Any = module
                processed.set_processor(WrittenOutAttention())

    def forward(self, x: Tensor, noise_level: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """[B, C, H, W], [B] levels ln(sigma) / 4 in float32 or wider, and [B] labels or None, to [B, C, H, W]."""
        return self.unet(x, self.time(noise_level), class_labels=class_labels, return_dict=False)[0]

    @abc.abstractmethod
    def time(self, noise_level: Tensor) -> Tensor:
        """The time step that the U-Net embeds, [B], from ln(sigma) / 4."""


class WrittenOutAttention:
    """Self-attention of the library's, with a second derivative, and with its softmax in the network's precision."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[B, C, H, W] to the same. The last three arguments are unused: the library warns where they are not named."""
        tokens = hidden_states.flatten(2).mT
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.mT).mT
        q, k, v = (attn.head_to_batch_dim(project(tokens)) for project in (attn.to_q, attn.to_k, attn.to_v))
        scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=attn.scale)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(v.dtype)
        mixed = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(weights @ v)))
        images = mixed.mT.unflatten(2, hidden_states.shape[2:])
        return (images + hidden_states if attn.residual_connection else images) / attn.rescale_output_factor


class DiffusersUNet(PipelineUNet):
    """The network of a ConsistencyModelPipeline; its time is 1000 ln(sigma) / 4 (arXiv 2303.01469, appendix C)."""

    network_name = "diffusers-unet2d"

    def time(self, noise_level: Tensor) -> Tensor:
        return 1000 * noise_level


class UnscaledUNet(PipelineUNet):
    """The network of the community's ConsistencyPipeline: its input is the noisy image as it is, its time is sigma.

    Its c_out is sigma_data sigma / sqrt(sigma^2 + sigma_data^2), which is not 0 at sigma_min: f(x, sigma_min) is x but
    for 0.002 F, where the paper's boundary condition has x exactly.
    """

    network_name = "diffusers-unet2d-unscaled"
    boundary_error = 0.02

    def time(self, noise_level: Tensor) -> Tensor:
        return (4 * noise_level).exp()

    def scalings(self, sigma: Tensor, *, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in at ``sigma`` (any shape)."""
        c_skip, _, _ = boundary_scalings(sigma, sigma_data=sigma_data, sigma_min=sigma_min)
        return c_skip, sigma_data * sigma / (sigma**2 + sigma_data**2).sqrt(), torch.ones_like(sigma)


NETWORKS: dict[str, type[PipelineUNet]] = {kind.network_name: kind for kind in (DiffusersUNet, UnscaledUNet)}


def is_diffusers(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a pipeline's index."""
    return (Path(folder) / INDEX).is_file()


def describe_diffusers(folder: str | os.PathLike[str], name: str) -> BackboneRecord:
    """The record of a pipeline's folder that has none of ours, from its configurations. Raises ``BackboneFileError``
    where a part is missing, or the pipeline is not a consistency model."""
    folder = Path(folder)
    index, unet = _configuration(folder / INDEX), _configuration(folder / UNET_CONFIG)
    network, scheduler = UnscaledUNet.network_name, {}
    if index.get("_class_name") != "ConsistencyPipeline":
        network, scheduler = DiffusersUNet.network_name, _configuration(folder / SCHEDULER_CONFIG)
        _require_class(folder, scheduler, "CMStochasticIterativeScheduler")
    _require_class(folder, unet, "UNet2DModel")
    noise = {key: scheduler[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in scheduler}
    try:
        NoiseRange.from_dict(noise)
    except SettingsError as error:
        raise BackboneFileError(f"{folder / SCHEDULER_CONFIG}: {error}") from error
    weights = next((file for file in WEIGHTS if (folder / file).is_file()), next(iter(WEIGHTS)))
    try:
        return BackboneRecord(
            name=name,
            network=network,
            network_config=unet,
            noise=noise,
            image_shape=_image_shape(unet),
            num_classes=unet.get("num_class_embeds"),
            weights_file=weights,
            weights_dtype=WEIGHTS[weights],
            weights_sha256="",
        )
    except SettingsError as error:
        raise BackboneFileError(f"{folder / UNET_CONFIG}: {error}") from error


def _image_shape(config: dict[str, Any]) -> Any:
    """(C, H, W) as a UNet2DModel's configuration says, valid or not."""
    side = config.get("sample_size")
    height, width = side if isinstance(side, (list, tuple)) and len(side) == 2 else (side, side)
    return (config.get("in_channels", 3), height, width)


def read_unet(folder: str | os.PathLike[str], record: BackboneRecord, *, checked: bool = False) -> PipelineUNet:
    """The network of a pipeline's folder, its weights in float32, on the CPU.

    With ``checked`` the record is a file's own, so that the configuration beside the weights has to agree with it.
    Raises ``MissingExtraError``, or ``BackboneFileError`` for weights that are missing, cut off, hostile, or of another
    one.
    """
    _library()
    path, usual = Path(folder) / record.weights_file, next(iter(WEIGHTS))
    if record.weights_file not in WEIGHTS:
        raise BackboneFileError(f"{path}: the weights of a pipeline are {usual}, its shards or a variant.")
    if not path.is_file():
        kinds = (".safetensors", ".bin", ".msgpack", ".pt")
        found = sorted(file.name for file in path.parent.glob("*") if file.suffix in kinds)
        raise BackboneFileError(
            f"{Path(folder) / usual} is missing: {path.parent} holds {', '.join(found[:5]) or 'no weights'}. Fetch the "
            "folder again, or load it with the diffusers library, with its variant where it has one, and save it with "
            'save_pretrained(folder, max_shard_size="100GB").'
        )
    config = path.with_name("config.json")
    try:
        network = NETWORKS[record.network](build_unet(_configuration(config)).unet)
    except BackboneFileError:
        raise
    except Exception as error:  # a configuration that makes no sense makes the library raise anything
        raise BackboneFileError(f"{config} cannot be built by diffusers ({type(error).__name__}: {error}).") from error
    own = network.unet.state_dict()
    weights = {}
    for name, tensor in read_weights(path).items():
        parts = [part if name in own else _FORMER_NAMES.get(part, part) for part in name.split(".")]
        weights[".".join(parts)] = tensor
    with building():
        load_weights(network.unet, weights, path, record.name)
    _require_agreement(config, configuration_of(network), record, checked)
    return network


def _require_agreement(path: Path, config: dict[str, Any], record: BackboneRecord, checked: bool) -> None:
    shape = {"image_shape": _image_shape(config), "num_classes": config.get("num_class_embeds")}
    found = (config if checked else {}) | shape
    said = record.network_config | {name: getattr(record, name) for name in shape}
    different = [name for name in found.keys() & said.keys() if name[0] != "_" and found[name] != said[name]]
    if different:
        raise BackboneFileError(
            f"{path} is not the configuration that the record describes: {', '.join(sorted(different))} differ(s). "
            "Fetch or write the folder again."
        )


def save_pipeline(model: KarrasModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the pipeline of a model around a ``PipelineUNet`` into an existing folder, or raise
    ``BackboneFileError``."""
    library = _library()
    assert isinstance(model.network, PipelineUNet)
    unet: Any = model.network.unet
    if unet.dtype != dtype or not all(tensor.is_contiguous() for tensor in unet.state_dict().values()):
        unet = copy.deepcopy(unet).to(dtype, memory_format=torch.contiguous_format)  # older safetensors take no other
    consistency = isinstance(model, ConsistencyBackbone)  # no pipeline of the library samples from a denoiser
    try:
        if consistency and not isinstance(model.network, UnscaledUNet):
            scheduler = library.CMStochasticIterativeScheduler(**model.noise.to_dict())
            library.ConsistencyModelPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
            return
        unet.save_pretrained(folder / "unet")
        if consistency:
            index = {"_class_name": "ConsistencyPipeline", "unet": ["diffusers", "UNet2DModel"]}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except (SafetensorError, OSError) as error:
        raise BackboneFileError(f"{folder} could not be written ({error}). Is the disk full, or read-only?") from error


def build_unet(config: dict[str, Any], device: str = "cpu") -> DiffusersUNet:
    """A network of a UNet2DModel's configuration, its weights random; on the CPU, or on "meta"."""
    with building(device):
        return DiffusersUNet(_library().UNet2DModel.from_config(config))


def fresh_unet(config: dict[str, Any], device: str = "cpu") -> DiffusersUNet:
    """A network for a training to start from: the last layer of each branch and of the whole at zero.

    So do Dhariwal and Nichol 2021 (arXiv 2105.05233); the library leaves these layers random.

    Raises:
        MissingExtraError: the diffusers library is not installed.
    """
    network = build_unet(config, device)
    resnet, attention = _library().models.resnet.ResnetBlock2D, _library().models.attention_processor.Attention
    whole: Any = network.unet
    last: list[Any] = [whole.conv_out]
    for module in whole.modules():
        last += [module.conv2] if isinstance(module, resnet) else []
        last += [module.to_out[0]] if isinstance(module, attention) else []
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


def openai_unet(
    image_shape: Sequence[int], channels: Sequence[int], attention: Sequence[bool], groups: int = 32, **more: Any
) -> dict[str, Any]:
    """A UNet2DModel's configuration for the U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233)."""
    colours, height, width = image_shape
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": colours,
        "out_channels": colours,
        "block_out_channels": list(channels),
        "down_block_types": ["AttnDownBlock2D" if flag else "ResnetDownsampleBlock2D" for flag in attention],
        "up_block_types": ["AttnUpBlock2D" if f else "ResnetUpsampleBlock2D" for f in reversed(attention)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": 1e-5,
        **more,
    }


def configuration_of(network: PipelineUNet) -> dict[str, Any]:
    """The configuration of the network inside, as JSON values."""
    values: Any = network.unet
    return json.loads(values.to_json_string())


def _library() -> Any:
    purpose = "This backbone is in the format of the diffusers library"
    optional_import("diffusers.models.attention_processor", "diffusers", purpose)
    return optional_import("diffusers", "diffusers", purpose)


def _require_class(folder: Path, values: dict[str, Any], expected: str) -> None:
    if values.get("_class_name") != expected:
        raise BackboneFileError(
            f"{folder} is not a consistency model of diffusers: it has a {values.get('_class_name')} "
            f"where a {expected} belongs."
        )


def _configuration(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneFileError(f"{path} cannot be read ({error}). Fetch or write the folder again.") from error
    if not isinstance(values, dict):
        raise BackboneFileError(f"{path} is not a configuration. Fetch or write the folder again.")
    return values
