"""From what a user writes to a backbone: a name, a folder, or a Hub id."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, overload

import torch

from cmap_defense.backbones.folder import check_kind, read_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser, KarrasModel
from cmap_defense.backbones.record import KINDS
from cmap_defense.backbones.registry import backbone_names, names_of_kind, registry_entry
from cmap_defense.backbones.registry.entry import LocalFolder, RegistryEntry
from cmap_defense.backbones.remote.cache import pinned
from cmap_defense.backbones.remote.fetch import fetch_entry, fetch_repository
from cmap_defense.common.paths import expanded
from cmap_defense.common.settings import require_choice
from cmap_defense.errors import BackboneFileError, MissingExtraError, SettingsError, WrongKindError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@overload
def load_backbone(
    source: str | os.PathLike[str], *, kind: Literal["consistency"], dtype: torch.dtype = ...
) -> ConsistencyBackbone: ...
@overload
def load_backbone(
    source: str | os.PathLike[str], *, kind: Literal["denoiser"], dtype: torch.dtype = ...
) -> EDMDenoiser: ...
@overload
def load_backbone(source: str | os.PathLike[str], *, kind: str | None = ..., dtype: torch.dtype = ...) -> Any: ...
def load_backbone(
    source: str | os.PathLike[str], *, kind: str | None = None, dtype: torch.dtype = torch.float32
) -> KarrasModel:
    """A backbone in eval mode, on the CPU, its weights needing no gradient.

    What is not on this machine yet is fetched once: from the Hub by huggingface_hub (HF_HOME, HF_TOKEN, HF_ENDPOINT,
    HF_HUB_OFFLINE and private repositories work as everywhere), official checkpoints from their authors' server into
    ``cmap-defense`` beside the Hub's cache.

    Args:
        source: a name (``cmap-defense backbones list``), a local folder, or a Hub id ``organisation/name`` or
            ``organisation/name@revision``. A name wins over a folder, and a folder over a Hub id, that is spelt alike;
            ``./name`` is always a folder.
        kind: "consistency" or "denoiser" where only that will do; None for whichever it is.
        dtype: of the weights, cast once; latents and losses stay in float32 whatever it is.

    Returns:
        A ``ConsistencyBackbone`` or an ``EDMDenoiser``, as its record says.

    Raises:
        UnknownNameError: no such name, or no such repository on the Hub.
        WrongKindError: it is of another kind than ``kind``.
        BackboneFileError: a file is missing, truncated, damaged or foreign, or could not be fetched.
        MissingExtraError: it is in the format of diffusers, and that library is not installed.
    """
    if kind is not None:
        require_choice("load_backbone", "kind", kind, KINDS)
    entry = entry_of(source)
    try:
        if entry is not None and not isinstance(entry.sources[0], LocalFolder):  # before it is fetched
            check_kind(entry.name, entry.kind, kind)
        folder = resolve_backbone(source)
        with with_remedy(entry):
            model = read_backbone(folder, kind=kind, dtype=dtype)
    except WrongKindError as error:
        raise WrongKindError(f"{error} Of that kind are: {names_of_kind(str(kind))}.") from error
    if entry is not None:
        _describe(model, entry)
        if isinstance(model, ConsistencyBackbone):
            model.default_settings = dict(model.record.settings) if model.record else None
    return model


def resolve_backbone(source: str | os.PathLike[str], *, force: bool = False, weights: bool = True) -> Path:
    """The local folder of ``source``, fetched first where it is not there, or with ``force``; errors as of
    ``load_backbone``.

    Without ``weights`` only the record of a Hub id is fetched.
    """
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if not text:
        what = "the text is empty" if source == "" else f"is {source!r}"
        raise SettingsError(f"A backbone is given as a name, a path or a Hub id, but {what}.")
    entry = entry_of(source)
    if entry is not None:
        return fetch_entry(pinned(entry, verified_only=force), force=force)[0]
    path = expanded(text)
    if isinstance(source, os.PathLike) or path.is_dir() or text.startswith((".", "~", os.sep)):
        return path
    if _HUB_ID.fullmatch(text):
        repo_id, _, revision = text.partition("@")
        return fetch_repository(repo_id, revision or None, force=force, weights=weights)
    if "/" in text or os.sep in text:  # no name has one, and a Hub id has one in its middle
        return path
    return Path(registry_entry(text).name)  # raises, with near matches


def entry_of(source: str | os.PathLike[str]) -> RegistryEntry | None:
    """The registry's entry when ``source`` is a name, None when it is anything else."""
    return registry_entry(source) if isinstance(source, str) and source in backbone_names() else None


@contextlib.contextmanager
def with_remedy(entry: RegistryEntry | None) -> Iterator[None]:
    """Let errors of a damaged file of a name say how to fetch it again."""
    try:
        yield
    except MissingExtraError:
        raise
    except BackboneFileError as error:
        if entry is None or isinstance(entry.sources[0], LocalFolder):
            raise
        raise BackboneFileError(
            f"{error} `cmap-defense backbones pull {entry.name} --force` fetches it again."
        ) from error


def _describe(model: KarrasModel, entry: RegistryEntry) -> None:
    """Complete a record that its folder left open, such as that of a diffusers pipeline, from the registry."""
    record = model.record
    assert record is not None
    if model.image_shape != entry.image_shape or model.num_classes != entry.num_classes:
        raise BackboneFileError(
            f"{entry.name} should make images of shape {entry.image_shape} with num_classes={entry.num_classes}, but "
            f"what was fetched has {model.image_shape} and {model.num_classes}. Fetch it again, or report it."
        )
    completed = {name: getattr(record, name) or value for name, value in entry.described().items()}
    model.record = record.replace(name=entry.name, **completed)
