"""Weights in files: safetensors, shards with an index, and tensors out of a pickle of which nothing is executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cmap_defense.errors import BackboneFileError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions of the weights in a file."""

STATE_DICTS = ("state_dict", "model_state_dict", "model", "net")
"""What people call the state dict in a checkpoint."""

_SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str, found: str | None = None) -> None:
    """Compare the checksum of a file with the recorded one."""
    found = found or sha256_of(path)
    if found != expected:
        raise BackboneFileError(
            f"{path} is not the file that the record describes: its SHA-256 is {found}, the record says {expected}. "
            "Fetch or write the folder again."
        )


def first_difference(network: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """In which tensors differ from a network's own, by name and shape, in words; None where they do not."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not wrong:
        return None
    return (
        f"{len(wrong)} tensor(s) are missing, unknown or of another shape, such as {wrong[0]!r} "
        f"(expected {expected.get(wrong[0])}, found {found.get(wrong[0])})"
    )


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load all of a network's tensors, which are from ``path``. Raises ``BackboneFileError`` where they differ."""
    wrong = first_difference(network, tensors)
    if wrong is not None:
        raise BackboneFileError(f"{path} does not hold the weights of {name!r}: {wrong}.")
    network.load_state_dict(tensors)


def weights_files(path: Path) -> list[Path]:
    """The file itself, and after an index its shards."""
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise BackboneFileError(
            f"{path} is not an index of shards ({type(error).__name__}: {error}). Fetch or write the folder again."
        ) from error
    wrong = [name for name in names if not isinstance(name, str) or not _SHARD.fullmatch(name)]
    if wrong or not names:
        raise BackboneFileError(
            f"{path} must name files of weights beside it, but names {wrong[0] if wrong else 'none'!r}. Fetch or write "
            "the folder again."
        )
    return [path, *(path.parent / name for name in names)]


def sha256_of_weights(path: Path) -> str:
    """The SHA-256 of a file; of an index, that of the names and SHA-256 of its shards."""
    files = weights_files(path)
    if len(files) == 1:
        return sha256_of(path)
    return hashlib.sha256("".join(f"{sha256_of(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the shards of an index; nothing in a pickle is executed."""
    tensors: dict[str, Tensor] = {}
    for part in weights_files(path):
        if part.suffix != ".json":
            tensors |= read_safetensors(part) if part.suffix == ".safetensors" else read_pickle(part)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises ``BackboneFileError`` when it is missing, cut off or something else."""
    if not path.is_file():
        raise BackboneFileError(f"{path} is missing. Fetch or write the folder again.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise BackboneFileError(
            f"{path} is not a whole safetensors file ({error}){apparent_kind(path)}. Fetch or write the folder again."
        ) from error


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file, shared tensors once for each name. Raises ``BackboneFileError`` when there is no space or no
    permission."""
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shared = any(tensor.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in written.values())
        written[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    try:
        save_file(written, path)
    except (SafetensorError, OSError) as error:
        raise BackboneFileError(f"{path} could not be written ({error}). Is the disk full, or read-only?") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that ``torch.save`` wrote; nothing in the file is executed."""
    state = _unpickled(path)
    if not _is_state_dict(state):
        raise BackboneFileError(f"{path} is no state dict: it must map names to tensors.")
    return dict(state)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict of safetensors, or of ``torch.save``, where it may be an entry of a checkpoint."""
    if path.suffix == ".safetensors" or _is_safetensors(path):
        return read_safetensors(path)
    saved = _unpickled(path)
    entries = [saved[name] for name in STATE_DICTS if isinstance(saved, dict) and name in saved]
    for state in (saved, *entries):
        if _is_state_dict(state):
            return dict(state)
    raise BackboneFileError(
        f"{path} holds no state dict, by itself or as {', '.join(STATE_DICTS)}: save it with "
        "torch.save(model.state_dict(), path)."
    )


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like one of safetensors: the length of a JSON object, and that object."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def _unpickled(path: Path) -> Any:
    """What ``torch.save`` wrote; the errors of ``read_pickle``."""
    if not path.is_file():
        raise BackboneFileError(f"{path} is missing. Fetch it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneFileError(
            f"{path} is refused: it is no plain dictionary of tensors, or requires code to be run on loading"
            f"{apparent_kind(path)}. Nothing of it was executed. Get the weights as safetensors, from somebody you "
            "trust."
        ) from error
    except Exception as error:  # a malformed file makes the unpickler raise anything
        raise BackboneFileError(
            f"{path} is not a whole PyTorch file ({error}){apparent_kind(path)}. Fetch it again."
        ) from error


def apparent_kind(path: Path) -> str:
    """What a broken file seems to be, for the end of a sentence."""
    try:
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError:
        return ""
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "; it is a web page, such as a login or an error page"
    if start.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer, not the file itself"
    return ""
