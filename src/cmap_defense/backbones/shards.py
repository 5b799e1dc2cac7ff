"""The files that the diffusers library keeps a network's weights in: one file, shards with an index, or a variant."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from torch import Tensor

from cmap_defense.backbones.weights import read_pickle, read_safetensors, sha256_of
from cmap_defense.errors import BackboneFileError

_VARIANTS = {"": "float32", ".fp16": "float16", ".bf16": "bfloat16"}
"""Variants by their part of the file name, with the precision that they are saved in."""

_STEM = "unet/diffusion_pytorch_model"
_SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")

WEIGHTS = tuple(
    name
    for variant in _VARIANTS
    for suffix in ("safetensors", "bin")
    for name in (f"{_STEM}{variant}.{suffix}", f"{_STEM}.{suffix}.index{variant}.json")
)
"""The weights of a pipeline, in order of preference: full precision before a variant, safetensors before a pickle (of
which tensors alone are read), one file before an index of shards."""


def dtype_of_file(name: str) -> str:
    """The precision that a file of ``WEIGHTS`` is saved in."""
    return next(dtype for variant, dtype in reversed(_VARIANTS.items()) if f"{variant}." in Path(name).name)


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the shards of an index."""
    tensors: dict[str, Tensor] = {}
    for part in weights_files(path):
        if part.suffix != ".json":
            tensors |= read_safetensors(part) if part.suffix == ".safetensors" else read_pickle(part)
    return tensors


def sha256_of_weights(path: Path) -> str:
    """The SHA-256 of a file; of an index, that of the names and SHA-256 of its shards."""
    files = weights_files(path)
    if len(files) == 1:
        return sha256_of(path)
    return hashlib.sha256("".join(f"{sha256_of(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def describe_missing(folder: Path) -> str:
    """For a pipeline without weights of ``WEIGHTS``: what there is, and how to save it so that it is read."""
    place = folder / Path(_STEM).parent
    found = sorted(file.name for file in place.glob("*") if file.suffix in (".safetensors", ".bin", ".msgpack", ".pt"))
    held = f"holds {', '.join(found[:5])}" if found else "holds no weights"
    return (
        f"{folder / WEIGHTS[0]} is missing: {place} {held}. Fetch the folder again, or load it with the diffusers "
        'library, with its variant where it has one, and save it with save_pretrained(folder, max_shard_size="100GB").'
    )
