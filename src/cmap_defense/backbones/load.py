"""From what a user writes to a backbone: a name, a folder, or a Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from cmap_defense.backbones.folder import RECORD_FILE, read_backbone
from cmap_defense.backbones.hub import fetch_folder
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.registry import backbone_names, registry_entry
from cmap_defense.errors import BackboneFileError, SettingsError

__all__ = ["load_backbone", "resolve_backbone"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def load_backbone(source: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> ConsistencyBackbone:
    """A backbone in eval mode, on the CPU, its weights needing no gradient.

    Args:
        source: a name (``cmap-defense backbones list``), a local folder, or a Hub id ``organisation/name`` or
            ``organisation/name@revision``. A name wins over a folder, and a folder over a Hub id, that is spelt alike;
            ``./name`` is always a folder.
        dtype: of the weights, cast once; latents and losses stay in float32 whatever it is.

    Raises:
        UnknownNameError: no such name, or no such repository on the Hub.
        BackboneFileError: a file is missing, truncated, damaged or foreign, or could not be fetched.
    """
    return read_backbone(resolve_backbone(source), dtype=dtype)


def resolve_backbone(source: str | os.PathLike[str]) -> Path:
    """The local folder of ``source``; a Hub repository is fetched first. Raises as :func:`load_backbone`."""
    if not isinstance(source, (str, os.PathLike)):
        raise SettingsError(f"A backbone is given as a name, a path or a Hub id, but is {source!r}.")
    text = os.fspath(source)
    if not text:
        raise SettingsError("A backbone is given as a name, a path or a Hub id, but the text is empty.")
    if isinstance(source, str) and text in backbone_names():
        return registry_entry(text).folder
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # "~nobody"
        raise BackboneFileError(f"{text} is no folder: {error}") from error
    if isinstance(source, os.PathLike) or path.is_dir() or text.startswith((".", "~", os.sep)):
        return path
    if _HUB_ID.fullmatch(text):
        repo_id, _, revision = text.partition("@")
        return fetch_folder(repo_id, revision or None, [RECORD_FILE, "*.safetensors"])
    return registry_entry(text).folder
