"""Checkpoints that are whole or not there, in files of a bounded size; the newest whole one is read.

    checkpoint-00000390/
      index.json              step, settings, which tensor is where, SHA-256 of the parts and of all this; written last
      part-000.safetensors    tensors, flat, and segments of those that are larger than a part
      part-001.safetensors

The folder is written under another name and renamed. It may be carried elsewhere file by file: until all of them are
there and unharmed, it is no checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones.weights import check_sha256, read_safetensors, sha256_of, write_safetensors
from cmap_defense.common.files import refuse_other_settings
from cmap_defense.errors import BackboneFileError, CheckpointError, CheckpointWarning

INDEX = "index.json"
MEGABYTE = 10**6
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial"
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a training: steps done, settings by part, tensors by name."""

    step: int
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, part_mb: int | None = None) -> Path:
    """Write ``checkpoint-<step>``, and delete all but it and the one before; later ones, which are damaged, too."""
    path = folder / f"checkpoint-{checkpoint.step:08d}"
    for left_behind in folder.glob(f"checkpoint-*{_PARTIAL}"):
        if _NAME.fullmatch(left_behind.name.removesuffix(_PARTIAL)):
            shutil.rmtree(left_behind, ignore_errors=True)
    partial = folder / (path.name + _PARTIAL)
    try:
        partial.mkdir()
        _write(partial, checkpoint, part_mb)
        if path.exists():  # a damaged one, or it would have been continued
            shutil.rmtree(path)
        partial.replace(path)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    there = _checkpoints(folder)
    here = there.index(path)
    for old in (*there[: max(0, here - 1)], *there[here + 1 :]):
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The newest whole checkpoint, or None when there is none; of damaged and incomplete ones it warns."""
    newest, there = newest_whole(folder), _checkpoints(folder)
    ignored = there if newest is None else there[there.index(newest[0]) + 1 :]
    if ignored:
        warnings.warn(
            f"{', '.join(path.name for path in ignored)} in {folder} cannot be read: damaged or incomplete. The "
            f"training {'begins anew' if newest is None else f'goes on from {newest[0].name}'}.",
            CheckpointWarning,
            stacklevel=2,
        )
    if newest is None:
        return None
    refuse_other_checkpoint(*newest, settings)
    return newest[0]


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The same whatever its settings are, and these. Raises ``CheckpointError`` where a file that is there cannot be
    read."""
    for path in reversed(_checkpoints(folder)):
        try:
            index = _read_index(path)
            for part in index["parts"]:
                check_sha256(path / part["file"], part["sha256"])
        except OSError as error:  # BackboneFileError is one
            cause = error.__cause__ if isinstance(error, BackboneFileError) else error
            if isinstance(cause, OSError) and not isinstance(cause, _MISSING):
                raise CheckpointError(
                    f"{path} cannot be read now ({cause}), which does not mean that it is damaged. Give the same "
                    "command again; where it stays so, move that folder elsewhere to go on from an older one."
                ) from error
            continue
        return path, index["settings"]
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's step, settings and tensors."""
    index = _read_index(path)
    segments = {part["file"]: read_safetensors(path / part["file"]) for part in index["parts"]}
    tensors = {
        name: torch.cat([segments[file][key] for file, key in entry["parts"]]).reshape(entry["shape"])
        for name, entry in index["tensors"].items()
    }
    return Checkpoint(index["step"], index["settings"], tensors)


def refuse_other_checkpoint(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError``, which lists what differs, a line per option, unless both are the same."""
    refuse_other_settings(
        there,
        here,
        CheckpointError,
        what=f"{path} was made with other settings",
        remedy="Give the same settings to continue it, or another folder to start again.",
    )


def _write(folder: Path, checkpoint: Checkpoint, part_mb: int | None) -> None:
    parts, where = [], {}
    for number, segments in enumerate(_parts(checkpoint.tensors, part_mb)):
        file = f"part-{number:03d}.safetensors"
        write_safetensors({key: segment.cpu() for key, (_, segment) in segments.items()}, folder / file)
        _sync(folder / file)
        parts.append({"file": file, "sha256": sha256_of(folder / file)})
        for key, (name, _) in segments.items():
            where.setdefault(name, []).append([file, key])
    tensors = {name: {"shape": list(t.shape), "parts": where[name]} for name, t in checkpoint.tensors.items()}
    index = {"format": 1, "step": checkpoint.step, "settings": checkpoint.settings, "parts": parts, "tensors": tensors}
    (folder / INDEX).write_text(json.dumps(index | {"sha256": _digest(index)}) + "\n", encoding="utf-8")
    _sync(folder / INDEX)
    _sync(folder)


def _parts(tensors: Mapping[str, Tensor], part_mb: int | None) -> Iterator[dict[str, tuple[str, Tensor]]]:
    """Flat segments of the tensors, as many as fit a file with its header: key -> (name of the tensor, segment)."""
    space = limit = sys.maxsize if part_mb is None else part_mb * MEGABYTE - 1024
    segments: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        flat, begin = tensor.detach().flatten(), 0
        while begin < len(flat) or (begin == 0 and not len(flat)):
            heading = len(name.encode()) + 192  # of the segment in the file's header
            if space < heading + flat.itemsize:
                yield segments
                segments, space = {}, limit
            count = min(len(flat) - begin, (space - heading) // flat.itemsize)
            segments[f"{name}#{begin}"] = (name, flat[begin : begin + count])
            space -= heading + count * flat.itemsize
            begin += max(1, count)
    yield segments


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneFileError(f"{path / INDEX} cannot be read ({error}).") from error
    if not isinstance(index, dict) or index.get("format") != 1:
        raise BackboneFileError(f"{path / INDEX} is no index of a checkpoint of format 1.")
    if index.pop("sha256", None) != _digest(index):
        raise BackboneFileError(f"{path / INDEX} is damaged: its SHA-256 is not that of its content.")
    return index


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _sync(path: Path) -> None:
    """To the disk itself, a file or the names in a folder, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(folder: Path) -> list[Path]:
    found = [(match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]))]
