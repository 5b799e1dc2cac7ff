"""From a source to a folder on this machine: the Hub, official files and their conversion."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import constants

from cmap_defense.backbones import diffusers
from cmap_defense.backbones.convert.flax import NotACheckpointError
from cmap_defense.backbones.convert.jcm import convert_jcm
from cmap_defense.backbones.folder import RECORD_FILE, clear_leftovers, read_record, write_backbone
from cmap_defense.backbones.karras import EDMDenoiser, KarrasModel
from cmap_defense.backbones.registry.entry import HubRepository, LocalFolder, OfficialFile, RegistryEntry, Source
from cmap_defense.backbones.remote.cache import announce, cache_folder, lock_or_wait, pin
from cmap_defense.backbones.remote.hub import fetch_file, fetch_folder
from cmap_defense.backbones.weights import check_sha256, sha256_of, sha256_of_weights, weights_files
from cmap_defense.errors import BackboneFileError, CmapError, SettingsError

MIRROR = "CMAP_DEFENSE_MIRROR"
"""The variable that names another server for the official files: it takes the place of the address up to the path."""

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")

_CONVERSION = 2
"""Raised when a converter changes what it writes, so that older conversions are not used."""


def fetch_entry(entry: RegistryEntry, *, force: bool = False) -> tuple[Path, Source]:
    """The local folder of an entry, fetched first where it is not there yet, and the source that it came from."""
    for source in entry.sources[:-1]:
        try:
            return _fetch_source(entry, source, force), source
        except CmapError as error:  # noqa: PERF203 - two or three sources
            announce(f"{entry.name}: {source.address} cannot be used ({error}); trying the next source.")
    return _fetch_source(entry, entry.sources[-1], force), entry.sources[-1]


def fetch_repository(repo_id: str, revision: str | None, *, weights: bool = True, force: bool = False) -> Path:
    """The local copy of a repository: its record or configurations, and then the one weights file that they name.

    A commit that is in the cache whole is taken from there, without a request to the Hub.
    """
    described = [RECORD_FILE, *diffusers.PIPELINE_FILES]
    if not force and revision is not None and _COMMIT.fullmatch(revision):
        with contextlib.suppress(CmapError):  # it is not in the cache
            folder = fetch_folder(repo_id, revision, described, offline=True)
            if _has_weights(folder):
                return folder
    folder = fetch_folder(repo_id, revision, described, force=force)
    if not _is_backbone(folder):
        raise BackboneFileError(
            f"{repo_id} holds no backbone that this package reads: it has neither {RECORD_FILE} nor {diffusers.INDEX}."
        )
    if not weights or (_has_weights(folder) and not force):
        return folder
    commit, names = folder.name, _weights_names(folder)  # the commit that the record came from
    for name in names:
        fetch_folder(repo_id, commit, [name], force=force)
        if (folder / name).is_file():
            parts = [part.relative_to(folder).as_posix() for part in weights_files(folder / name)]
            if len(parts) > 1:
                fetch_folder(repo_id, commit, parts[1:], force=force)
            for part in parts:
                if not (folder / part).is_file():
                    raise BackboneFileError(f"{name} of {repo_id} at {commit} names {part}, which is not there.")
                _check_blob(folder / part)
            return folder
    missing = f"{names[0]}{', nor its shards or a variant,' if len(names) > 1 else ''} of {repo_id} at {commit}"
    if constants.HF_HUB_OFFLINE:
        raise BackboneFileError(
            f"{missing} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it. Run "
            f"`cmap-defense backbones pull {repo_id}@{commit}` on a machine with a network."
        )
    raise BackboneFileError(f"There is no {missing}: the repository lacks its weights.")


def _is_backbone(folder: Path) -> bool:
    return (folder / RECORD_FILE).is_file() or diffusers.is_diffusers(folder)


def _weights_names(folder: Path) -> tuple[str, ...]:
    """Where the weights may be: in the record's file, or in one of diffusers', safetensors before a pickle."""
    return (read_record(folder).weights_file,) if (folder / RECORD_FILE).is_file() else tuple(diffusers.WEIGHTS)


def _has_weights(folder: Path) -> bool:
    """Whether the folder is a backbone with all files of its weights."""
    found = [name for name in _weights_names(folder) if (folder / name).is_file()] if _is_backbone(folder) else []
    return bool(found) and all(part.is_file() for part in weights_files(folder / found[0]))


def _check_blob(path: Path) -> None:
    """Compare a large file with the checksum that the Hub's cache names it by; the client compares sizes alone."""
    blob = path.resolve()
    if path.is_symlink() and _SHA256.fullmatch(blob.name):
        try:
            check_sha256(path, blob.name)
        except BackboneFileError:
            blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise


def _fetch_source(entry: RegistryEntry, source: Source, force: bool) -> Path:
    if isinstance(source, LocalFolder):
        if not source.folder.is_dir():
            raise BackboneFileError(f"{source.folder}, where {entry.name} should be, is not there.")
        return source.folder
    if isinstance(source, OfficialFile):
        return _fetch_official(entry, source, force)
    folder = fetch_repository(source.repo_id, source.revision, force=force)
    _require_pinned_weights(entry, source, folder)
    if source.revision is None and _COMMIT.fullmatch(folder.name):
        try:
            pin(entry.name, source, revision=folder.name)
        except BackboneFileError as error:  # the model is there all the same
            announce(f"{entry.name}: its commit could not be noted ({error})")
    return folder


def _require_pinned_weights(entry: RegistryEntry, source: HubRepository, folder: Path) -> None:
    weights = folder / read_record(folder).weights_file
    try:
        if source.sha256 is not None:
            check_sha256(weights, source.sha256, sha256_of_weights(weights))
    except BackboneFileError as error:
        raise BackboneFileError(
            f"{error} `cmap-defense backbones pull {entry.name} --force` fetches it again; when it stays so, the "
            "repository's file was replaced, and should not be trusted."
        ) from error


def _fetch_official(entry: RegistryEntry, source: OfficialFile, force: bool) -> Path:
    """The folder with the conversion of an official file; made when it is not there, by one process at a time."""
    made_from = f"{source.url} {source.params} {source.config.to_json()} {entry.kind} {_CONVERSION}"
    folder = cache_folder() / "converted" / f"{entry.name}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    if not force and _is_conversion_of(folder, source):
        return folder
    try:
        with lock_or_wait(folder, entry.name):
            if force or not _is_conversion_of(folder, source):
                _convert(entry, source, folder, force)
    except BackboneFileError:
        raise
    except OSError as error:
        raise BackboneFileError(
            f"{entry.name} could not be written to {cache_folder()} ({error}). Free some space, or set "
            "CMAP_DEFENSE_CACHE to another folder; what was fetched is kept."
        ) from error
    return folder


def _convert(entry: RegistryEntry, source: OfficialFile, folder: Path, force: bool) -> None:
    """Fetch the official file, unless an earlier run left it whole, and convert it; under the folder's lock."""
    checkpoint = cache_folder() / "downloads" / f"{folder.name}.checkpoint"
    url = _mirrored(source.url)
    if force and not constants.HF_HUB_OFFLINE:
        checkpoint.unlink(missing_ok=True)
    if not checkpoint.is_file():
        if constants.HF_HUB_OFFLINE:
            raise BackboneFileError(
                f"{entry.name} has to be fetched{' again' if force else ''}, which HF_HUB_OFFLINE forbids. Run "
                f"`cmap-defense backbones pull {entry.name}` on a machine with a network, or copy {folder.parent}."
            )
        announce(
            f"fetching {entry.name} (about {source.about}), once, from {url} to {cache_folder()}; "
            "a broken transfer is continued."
        )
        fetch_file(url, checkpoint)
    checksum, size = sha256_of(checkpoint), checkpoint.stat().st_size
    if source.sha256 not in (None, checksum) or source.size not in (None, size):
        checkpoint.unlink()
        raise BackboneFileError(
            f"{url} is not the expected file: it has {size:,} bytes and the SHA-256 {checksum}, the record says "
            f"{source.size or 'nothing'} and {source.sha256}. It was removed. Fetch it again; when it stays so, the "
            "file was replaced, and should not be trusted."
        )
    announce(f"converting {entry.name}, once; some seconds.")
    try:
        model: KarrasModel = convert_jcm(checkpoint, source.config, source.params)
    except CmapError as error:
        if isinstance(error, NotACheckpointError) or source.sha256 is None:
            checkpoint.unlink(missing_ok=True)  # no checksum says that it is the right file: the next run fetches it
        raise
    if entry.kind == "denoiser":
        model = EDMDenoiser(model.network, model.image_shape, model.noise)
    clear_leftovers(folder)
    fetched = {"url": source.url, "fetched_from": url, "sha256": checksum, "size": size}
    source_of = fetched | {"converter": "jcm", "params": source.params}
    write_backbone(model, folder, name=entry.name, source=source_of, **entry.described())
    checkpoint.unlink(missing_ok=True)


def _is_conversion_of(folder: Path, source: OfficialFile) -> bool:
    """Whether the folder is whole and was made from the recorded file; its weights are checked on reading."""
    try:
        record = read_record(folder)
    except BackboneFileError:
        return False
    made_from = record.source.get("sha256")
    return (folder / record.weights_file).is_file() and source.sha256 in (None, made_from)


def _mirrored(url: str) -> str:
    mirror = os.environ.get(MIRROR)
    if not mirror:
        return url
    if not mirror.startswith(("http://", "https://")):
        raise SettingsError(f"{MIRROR} must be an address such as https://mirror.example.org, but is {mirror!r}.")
    return mirror.rstrip("/") + "/" + url.split("://", 1)[1].partition("/")[2]
