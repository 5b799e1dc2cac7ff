"""The package's folder beside the Hub's cache: downloads, converted models, and the notes about what was verified."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from huggingface_hub import constants

from cmap_defense.backbones.registry.entry import LocalFolder, OfficialFile, RegistryEntry, Source
from cmap_defense.common.files import write_json
from cmap_defense.common.paths import expanded, home
from cmap_defense.errors import BackboneFileError, SettingsError

PINS_FILE = "verified.json"
LONGEST_WAIT = 2 * 3600.0
"""Seconds after which a lock is not waited for any more."""


def announce(message: str) -> None:
    """Print a line on standard error, where there is one: only around what takes long, such as a download."""
    if sys.stderr is not None:
        print(f"cmap-defense: {message}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """CMAP_DEFENSE_CACHE, or ``cmap-defense`` in HF_HOME (by default ~/.cache/huggingface)."""
    own = os.environ.get("CMAP_DEFENSE_CACHE")
    if own:
        return expanded(own)
    if constants.HF_HOME.startswith("~"):  # huggingface_hub leaves it so where there is no home folder
        home("CMAP_DEFENSE_CACHE")
    return expanded(constants.HF_HOME) / "cmap-defense"


@contextlib.contextmanager
def lock_or_wait(path: Path, what: str) -> Iterator[None]:
    """One process at a time; the others wait and print a line. Most systems free the lock of a process that dies."""
    lock = filelock.FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            announce(f"another process is at work on {what}; waiting for it.")
            lock.acquire(timeout=LONGEST_WAIT)
    except (OSError, NotImplementedError) as error:  # a timeout among them
        raise BackboneFileError(
            f"{path.parent} cannot be written to and locked ({error}). If no other process is at work on {what}, "
            f"remove {path}.lock, or set CMAP_DEFENSE_CACHE to a folder of your own, with space and locks."
        ) from error
    try:
        yield
    finally:
        lock.release()


def pinned(entry: RegistryEntry, *, verified_only: bool = False) -> RegistryEntry:
    """The entry with the commits and checksums that were noted on this machine, where it names none itself.

    A commit is noted when a name that has none is fetched for the first time, so that the name stands for the same
    model from then on; the checksum is noted by ``verify``.
    """
    if all(isinstance(source, LocalFolder) for source in entry.sources):
        return entry
    try:
        pins = _read_pins().get(entry.name, {})
        sources = tuple(_with_pin(source, pins.get(source.address, {}), verified_only) for source in entry.sources)
    except (SettingsError, ValueError, AttributeError) as error:
        raise BackboneFileError(
            f"{cache_folder() / PINS_FILE} is no list of verified backbones ({error}). Remove it, and verify the "
            "backbones again."
        ) from error
    return dataclasses.replace(entry, sources=sources)


def pin(name: str, source: Source, **found: str) -> Path:
    """Note a commit, a checksum or both for a name's source. Returns the file."""
    path = cache_folder() / PINS_FILE
    with lock_or_wait(path, "the list of verified backbones"):
        pins = _read_pins()
        pins.setdefault(name, {}).setdefault(source.address, {}).update(found)
        write_json(path, pins)
    return path


def _with_pin(source: Source, found: dict[str, Any], verified_only: bool) -> Source:
    if isinstance(source, LocalFolder) or not found or (verified_only and "sha256" not in found):
        return source
    sha256 = source.sha256 or found.get("sha256")
    if isinstance(source, OfficialFile):
        return dataclasses.replace(source, sha256=sha256)
    if source.revision not in (None, found.get("revision")):
        return source  # verified at another commit than the one that is named now
    return dataclasses.replace(source, revision=found.get("revision"), sha256=sha256)


def _read_pins() -> dict[str, dict[str, dict[str, Any]]]:
    """By name and address: what was noted. Nothing where there is no file, or no place for one."""
    try:
        return json.loads((cache_folder() / PINS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, SettingsError):
        return {}
    except OSError as error:
        raise BackboneFileError(f"{error}. Set CMAP_DEFENSE_CACHE to another folder.") from error
