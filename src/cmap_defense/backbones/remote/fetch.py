"""From a source to a folder on this machine: the Hub, official files and their conversion."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from huggingface_hub import constants

from cmap_defense.backbones import diffusers
from cmap_defense.backbones.convert.jcm import convert_jcm
from cmap_defense.backbones.folder import RECORD_FILE, read_record, write_backbone
from cmap_defense.backbones.karras import EDMDenoiser, KarrasModel
from cmap_defense.backbones.registry.entry import HubRepository, OfficialFile, PackagedFolder, RegistryEntry, Source
from cmap_defense.backbones.remote.cache import cache_folder, locked, tell
from cmap_defense.backbones.remote.download import download
from cmap_defense.backbones.remote.hub import fetch_folder
from cmap_defense.backbones.weights import check_sha256
from cmap_defense.errors import BackboneFileError, CmapError

__all__ = ["MIRROR", "fetch_entry", "fetch_repository"]

MIRROR = "CMAP_DEFENSE_MIRROR"
"""The variable that names another server for the official files: it takes the place of the address up to the path."""

_CONVERSION = 1
"""Raised when a converter changes what it writes, so that older conversions are not used."""


def fetch_entry(entry: RegistryEntry, *, force: bool = False) -> tuple[Path, Source]:
    """The local folder of an entry, fetched first where it is not there yet, and the source that it came from.

    Args:
        entry: of the registry, with what is pinned on this machine.
        force: fetch it anew even where it is there.

    Raises:
        BackboneFileError, UnknownNameError: no source could be had; the message is that of the last one.
    """
    for source in entry.sources[:-1]:
        try:
            return _fetch(entry, source, force), source
        except CmapError as error:  # noqa: PERF203 - two or three sources
            tell(f"{entry.name}: {source.address} cannot be used ({error}); trying the next source.")
    return _fetch(entry, entry.sources[-1], force), entry.sources[-1]


def fetch_repository(repo_id: str, revision: str | None, *, force: bool = False) -> Path:
    """The local copy of a repository: its record or configurations, and then the one weights file that they name.

    Raises:
        UnknownNameError, BackboneFileError: as :func:`~cmap_defense.backbones.remote.hub.fetch_folder`, or it holds no
            backbone.
    """
    folder = fetch_folder(repo_id, revision, [RECORD_FILE, *diffusers.PIPELINE_FILES], force=force)
    if not (folder / RECORD_FILE).is_file() and not diffusers.is_diffusers(folder):
        raise BackboneFileError(
            f"{repo_id} holds no backbone that this package reads: it has neither {RECORD_FILE} nor {diffusers.INDEX}."
        )
    if (folder / RECORD_FILE).is_file():
        candidates: tuple[str, ...] = (read_record(folder).weights_file,)
    else:
        candidates = diffusers.WEIGHTS
    there = any((folder / file).is_file() for file in candidates) and not force
    for file in candidates:
        if not there:
            fetch_folder(repo_id, folder.name, [file], force=force)  # of the commit that the record came from
            there = (folder / file).is_file()
    return folder


def _fetch(entry: RegistryEntry, source: Source, force: bool) -> Path:
    if isinstance(source, PackagedFolder):
        return source.folder
    if isinstance(source, HubRepository):
        folder = fetch_repository(source.repo_id, source.revision, force=force)
        if source.sha256 is not None:
            check_sha256(folder / read_record(folder).weights_file, source.sha256)
        return folder
    return _converted(entry, source, force)


def _converted(entry: RegistryEntry, source: OfficialFile, force: bool) -> Path:
    """The folder with the conversion of an official file; made when it is not there, by one process at a time."""
    made_from = f"{source.url} {source.params} {source.config.to_json()} {entry.kind} {_CONVERSION}"
    folder = cache_folder() / "converted" / f"{entry.name}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    if not force and _is_conversion_of(folder, source):
        return folder
    url = _mirrored(source.url)
    if constants.HF_HUB_OFFLINE:
        raise BackboneFileError(
            f"{entry.name} is not in the local cache ({folder.parent}), and HF_HUB_OFFLINE forbids to fetch it. Run "
            f"`cmap-defense backbones pull {entry.name}` on a machine with a network, or copy the folder."
        )
    with locked(folder, entry.name):
        if not force and _is_conversion_of(folder, source):
            return folder
        for leftover in folder.parent.glob(f".partial-{folder.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoint = cache_folder() / "downloads" / f"{folder.name}.checkpoint"
        tell(
            f"fetching {entry.name} (about {source.about}), once, from {url} to {folder.parent.parent}; "
            "a broken transfer is continued."
        )
        checksum = download(url, checkpoint, size=source.size, sha256=source.sha256)
        tell(f"converting {entry.name}, once; some seconds.")
        staged = folder.parent / f".partial-{folder.name}-{os.getpid()}"
        staged.mkdir()
        try:
            _convert(entry, source, checkpoint, checksum, staged)
            shutil.rmtree(folder, ignore_errors=True)
            staged.replace(folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        checkpoint.unlink(missing_ok=True)
    return folder


def _convert(entry: RegistryEntry, source: OfficialFile, checkpoint: Path, checksum: str, folder: Path) -> None:
    size = checkpoint.stat().st_size
    try:
        model: KarrasModel = convert_jcm(checkpoint, source.config, source.params)
    except CmapError:
        checkpoint.unlink(missing_ok=True)  # whole, but not what it should be: the next run fetches it afresh
        raise
    if entry.kind == "diffusion":
        model = EDMDenoiser(model.network, model.image_shape, model.noise)
    write_backbone(
        model,
        folder,
        name=entry.name,
        description=entry.description,
        settings=dict(entry.settings),
        figures=dict(entry.quality),
        licence=entry.licence,
        paper=entry.paper,
        source={"url": source.url, "size": size, "sha256": checksum, "converter": "jcm", "params": source.params},
    )


def _is_conversion_of(folder: Path, source: OfficialFile) -> bool:
    """Whether the folder is there and was made from the file that is meant; its weights are checked on reading."""
    if not (folder / RECORD_FILE).is_file():
        return False
    made_from = read_record(folder).source.get("sha256")
    return source.sha256 is None or made_from == source.sha256


def _mirrored(url: str) -> str:
    mirror = os.environ.get(MIRROR)
    return url if not mirror else mirror.rstrip("/") + "/" + url.split("://", 1)[1].partition("/")[2]
