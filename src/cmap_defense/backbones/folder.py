"""A backbone on disk: one folder with ``backbone.json`` and a safetensors file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cmap_defense.backbones.karras import ConsistencyBackbone, NoiseRange
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import BackboneFileError, SettingsError
from cmap_defense.settings import near_matches

__all__ = ["RECORD_FILE", "read_backbone", "read_record", "write_backbone"]

RECORD_FILE = "backbone.json"

_NETWORKS: dict[str, tuple[type[Any], Callable[[Any], nn.Module]]] = {
    "compact-unet": (CompactUNetConfig, CompactUNet),
}


def read_record(folder: str | os.PathLike[str]) -> BackboneRecord:
    """The record of a backbone folder. Raises :class:`BackboneFileError` when it is missing or not a record."""
    path = Path(folder) / RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BackboneFileError(
            f"{folder} is not a backbone folder: {RECORD_FILE} cannot be read ({error}). "
            "Such a folder is written by `cmap-defense train`."
        ) from error
    try:
        return BackboneRecord.from_json(text)
    except SettingsError as error:
        raise BackboneFileError(f"{path} is not a backbone record: {error}") from error


def read_backbone(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> ConsistencyBackbone:
    """The backbone of a folder: in eval mode, its weights needing no gradient, on the CPU.

    Args:
        folder: with ``backbone.json`` and the weights that it names.
        dtype: of the weights; they are cast once from the file's precision.

    Raises:
        BackboneFileError: a file is missing, truncated, damaged or foreign; the message names it.
    """
    record = read_record(folder)
    path = Path(folder) / record.weights_file
    if record.network not in _NETWORKS:
        near = near_matches(record.network, _NETWORKS)
        raise BackboneFileError(f"{Path(folder) / RECORD_FILE}: unknown network {record.network!r}.{near}")
    config_class, network_class = _NETWORKS[record.network]
    try:
        with torch.inference_mode(False):
            network = network_class(config_class.from_dict(record.network_config))
        backbone = ConsistencyBackbone(network, record.image_shape, NoiseRange.from_dict(record.noise))
    except SettingsError as error:
        raise BackboneFileError(f"{Path(folder) / RECORD_FILE}: {error}") from error
    if backbone.image_shape != getattr(network.config, "image_shape", record.image_shape):
        raise BackboneFileError(f"{Path(folder) / RECORD_FILE}: image_shape is not that of network_config.")
    weights = _read_weights(path, record)
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise BackboneFileError(
            f"{path} does not hold the weights of {record.name!r}: {len(wrong)} tensor(s) missing, foreign or of "
            f"another shape, such as {wrong[0]!r} (expected {expected.get(wrong[0])}, found {found.get(wrong[0])})."
        )
    with torch.inference_mode(False):
        network.load_state_dict(weights)
        backbone = backbone.to(dtype).eval().requires_grad_(False)
        if dtype == torch.float32:  # see docs/performance.md
            backbone = backbone.to(memory_format=torch.channels_last)
    backbone.record = record
    backbone.default_settings = dict(record.settings)
    return backbone


def write_backbone(
    backbone: ConsistencyBackbone,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    **described: Any,
) -> BackboneRecord:
    """Write a backbone folder: both files beside their places, then moved there, the weights first.

    A reader in between finds new weights beside an old record; the checksum tells, and it is an error.

    Args:
        backbone: its network must be one of this package's.
        folder: made when it is not there.
        dtype: precision of the weights in the file.
        described: further fields of :class:`BackboneRecord`, ``name`` at least.

    Raises:
        BackboneFileError: the network cannot be described in a record.
    """
    network = backbone.network
    names = [name for name, (_, network_class) in _NETWORKS.items() if type(network) is network_class]
    if not names:
        raise BackboneFileError(
            f"A {type(network).__name__} cannot be written; known networks: {', '.join(_NETWORKS)}."
        )
    content = save({name: t.detach().to("cpu", dtype).contiguous() for name, t in network.state_dict().items()})
    record = BackboneRecord(
        network=names[0],
        network_config=network.config.to_dict(),  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        noise=backbone.noise.to_dict(),
        image_shape=backbone.image_shape,
        weights_dtype=str(dtype).removeprefix("torch."),
        weights_sha256=hashlib.sha256(content).hexdigest(),
        **described,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {record.weights_file: content, RECORD_FILE: (record.to_json(indent=2) + "\n").encode()}
    partials = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, partial in partials.items():
            partial.write_bytes(files[name])
        for name, partial in partials.items():
            partial.replace(folder / name)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    return record


def _read_weights(path: Path, record: BackboneRecord) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise BackboneFileError(f"{path} is missing, the weights of {record.name!r}. Fetch or write the folder again.")
    try:
        checksum = _sha256(path)
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise BackboneFileError(
            f"{path} is not a whole safetensors file ({error}). Fetch or write the folder again."
        ) from error
    if checksum != record.weights_sha256:
        raise BackboneFileError(
            f"{path} is not the file that the record describes: its SHA-256 is {checksum}, the record says "
            f"{record.weights_sha256}. Fetch or write the folder again."
        )
    return weights


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
