"""A backbone on disk: one folder with ``backbone.json`` and safetensors, or a pipeline of the diffusers library."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmap_defense.backbones import diffusers
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser, KarrasModel, NoiseRange
from cmap_defense.backbones.ncsnpp import NCSNpp, NCSNppConfig
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.backbones.weights import (
    check_sha256,
    load_weights,
    read_safetensors,
    sha256_of,
    sha256_of_weights,
    write_safetensors,
)
from cmap_defense.common.modules import building, in_fastest_layout
from cmap_defense.common.paths import expanded
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import BackboneFileError, SettingsError, WrongKindError

RECORD_FILE = "backbone.json"

_NETWORKS: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "compact-unet": (CompactUNetConfig, CompactUNet),
    "ncsnpp": (NCSNppConfig, NCSNpp),
}
_KNOWN_NETWORKS = (*_NETWORKS, *diffusers.NETWORKS)
_MODELS: dict[str, type[KarrasModel]] = {model.kind: model for model in (ConsistencyBackbone, EDMDenoiser)}
_WRONG_KIND = {
    "consistency": "is a denoiser, and a consistency model is needed: a denoiser has no one-step generator.",
    "denoiser": "is a consistency model, and a denoiser is needed.",
}


def read_record(folder: str | os.PathLike[str]) -> BackboneRecord:
    """The record of a backbone folder; one of diffusers' that has none is described from its configurations.

    Raises:
        BackboneFileError: it is missing or not a record.
    """
    folder = expanded(folder)
    path = folder / RECORD_FILE
    if not path.is_file() and diffusers.is_diffusers(folder):
        whole = folder.absolute()
        cached = whole.parent.name == "snapshots"  # the Hub's cache, where the name is that of the repository
        repository = whole.parent.parent.name.removeprefix("models--").replace("--", "/")
        return diffusers.describe_diffusers(folder, repository if cached else whole.name)
    try:
        return BackboneRecord.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BackboneFileError(
            f"{folder} is not a backbone folder: {RECORD_FILE} cannot be read ({error}). "
            "Such a folder is written by `cmap-defense train` and `cmap-defense backbones convert`."
        ) from error
    except SettingsError as error:
        raise BackboneFileError(f"{path} is not a backbone record: {error}") from error


def read_backbone(
    folder: str | os.PathLike[str], *, kind: str | None = None, dtype: torch.dtype = torch.float32
) -> KarrasModel:
    """The model of a folder: in eval mode, its weights needing no gradient, on the CPU.

    Args:
        folder: with ``backbone.json`` and the weights that it names, or a pipeline of the diffusers library.
        kind: "consistency" or "denoiser" where only that will do; None for whichever the record says.
        dtype: of the weights; they are cast once from the file's precision.

    Returns:
        A ``ConsistencyBackbone`` or an ``EDMDenoiser``.

    Raises:
        BackboneFileError: a file is missing, truncated, damaged or foreign, or holds a model of another kind.
        MissingExtraError: the folder needs the diffusers library.
    """
    record = read_record(folder)
    check_kind(record.name, record.kind, kind)
    model = _read_model(expanded(folder), record, dtype)
    if isinstance(model, ConsistencyBackbone):
        model.default_settings = dict(record.settings)
    return model


def check_kind(name: str, kind: str, wanted: str | None) -> None:
    """Raise ``WrongKindError`` where a backbone is of another kind than the one that is wanted, if any is."""
    if wanted is not None and kind != wanted:
        raise WrongKindError(f"{name!r} {_WRONG_KIND[wanted]}")


def write_backbone(
    backbone: KarrasModel,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    **described: Any,
) -> BackboneRecord:
    """Write a backbone folder: files beside their places, then moved there, the weights first and the record last.

    A reader in between finds new weights beside an old record, which is an error, since their checksums differ. A
    network of the diffusers library is written as its pipeline, with the record beside the index.

    Args:
        backbone: its network must be one of this package's, or a UNet2DModel.
        folder: made when it is not there.
        dtype: precision of the weights in the file.
        described: further fields of ``BackboneRecord``, ``name`` at least.

    Returns:
        The record that was written.

    Raises:
        BackboneFileError: the backbone or its network cannot be described in a record, or the disk takes no more.
        SettingsError: the precision is none of floating-point numbers, or there is no name.
    """
    if not isinstance(backbone, KarrasModel):
        raise BackboneFileError(
            f"Only models of the package's classes, such as ConsistencyBackbone and EDMDenoiser, can be written, but "
            f"this is a {type(backbone).__name__}. Keep a backbone of your own as any module, by its state dict."
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"dtype must be a floating-point torch.dtype such as torch.float16, but is {dtype!r}.")
    if "name" not in described:
        raise SettingsError(
            'A backbone is written with a name for its record: write_backbone(..., name="my-backbone").'
        )
    folder, network = expanded(folder), backbone.network
    names = [name for name, (_, network_class) in _NETWORKS.items() if type(network) is network_class]
    names += [network.network_name] if isinstance(network, diffusers.PipelineUNet) else []
    if not names:
        known = ", ".join(_KNOWN_NETWORKS)
        raise BackboneFileError(f"A {type(network).__name__} cannot be written; known networks: {known}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True) as place:
            staged = Path(place)
            if isinstance(network, diffusers.PipelineUNet):
                diffusers.save_pipeline(backbone, staged, dtype)
                files = [next(iter(diffusers.WEIGHTS)), *reversed(diffusers.PIPELINE_FILES)]
                files = [file for file in files if (staged / file).is_file()]
                config = diffusers.configuration_of(network)
            else:
                files = [described.pop("weights_file", "weights.safetensors")]
                write_safetensors(_state(network, dtype), staged / files[0])
                config = cast(Any, network).config.to_dict()
            fields = {
                "kind": backbone.kind,
                "network": names[0],
                "network_config": config,
                "noise": backbone.noise.to_dict(),
                "image_shape": backbone.image_shape,
                "num_classes": backbone.num_classes,
                "weights_file": files[0],
                "weights_dtype": str(dtype).removeprefix("torch."),
                "weights_sha256": sha256_of(staged / files[0]),
            }
            record = BackboneRecord(**(fields | described))
            (staged / RECORD_FILE).write_text(record.to_json(indent=2) + "\n", encoding="utf-8")
            readable = (staged / RECORD_FILE).stat().st_mode  # as the umask says; the libraries' own files are private
            for file in (*files, RECORD_FILE):
                (folder / file).parent.mkdir(exist_ok=True)
                (staged / file).chmod(readable)
                (staged / file).replace(folder / file)
    except BackboneFileError:
        raise
    except OSError as error:
        raise BackboneFileError(f"{folder} could not be written ({error}). Is the disk full, or read-only?") from error
    return record


def clear_leftovers(folder: Path) -> None:
    """Remove what writers of a backbone that were killed left in its folder; for a process that alone writes there."""
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _state(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights for the file; the network's ``exact_tensors`` stay in float32 at least."""
    exact = getattr(network, "exact_tensors", frozenset())
    return {
        name: t.detach().to("cpu", torch.promote_types(dtype, torch.float32) if name in exact else dtype).contiguous()
        for name, t in network.state_dict().items()
    }


def _read_model(folder: Path, record: BackboneRecord, dtype: torch.dtype) -> KarrasModel:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, but is {dtype!r}.")
    path = folder / record.weights_file
    try:
        noise = NoiseRange.from_dict(record.noise)
        if record.network in diffusers.NETWORKS:
            if record.weights_sha256 and path.is_file():
                check_sha256(path, record.weights_sha256, sha256_of_weights(path))
            described = (folder / RECORD_FILE).is_file()
            network: nn.Module = diffusers.read_unet(folder, record, checked=described)
        elif record.network in _NETWORKS:
            network = _read_network(path, record)
        else:
            near = near_matches(record.network, _KNOWN_NETWORKS)
            raise SettingsError(f"unknown network {record.network!r}.{near}")
    except SettingsError as error:
        raise BackboneFileError(f"{folder / RECORD_FILE}: {error}") from error
    with building():
        model = _MODELS[record.kind](network, record.image_shape, noise, record.num_classes)
        model = in_fastest_layout(model.to(dtype).eval().requires_grad_(False))
    model.record = record
    return model


def _read_network(path: Path, record: BackboneRecord) -> nn.Module:
    """One of this package's networks with its weights. Raises SettingsError for a configuration that is none."""
    config_class, network_class = _NETWORKS[record.network]
    config = config_class.from_dict(record.network_config)
    if config.image_shape != record.image_shape:
        raise SettingsError("image_shape is not that of network_config.")
    weights = read_safetensors(path)
    check_sha256(path, record.weights_sha256)
    with building():
        network = network_class(config)
        load_weights(network, weights, path, record.name)
    return network
