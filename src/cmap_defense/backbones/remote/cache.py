"""The project's place on disk, beside the Hub's cache: downloads, converted models, what a user has verified."""

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

from cmap_defense.backbones.registry.entry import HubRepository, OfficialFile, RegistryEntry, Source
from cmap_defense.errors import BackboneFileError

__all__ = ["cache_folder", "locked", "pin", "pinned", "tell"]

_PINS = "verified.json"


def cache_folder() -> Path:
    """CMAP_DEFENSE_CACHE, or ``cmap-defense`` in HF_HOME (by default ~/.cache/huggingface)."""
    return Path(os.environ.get("CMAP_DEFENSE_CACHE") or Path(constants.HF_HOME) / "cmap-defense").expanduser()


def tell(message: str) -> None:
    """A line for the person who waits, on standard error: only before what takes long, such as a download."""
    print(f"cmap-defense: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """One process at a time; the others wait and say so. The system frees the lock of a process that dies.

    Raises:
        BackboneFileError: the lock cannot be made there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            tell(f"another process is at work on {what}; waiting for it.")
            lock.acquire()
    except OSError as error:
        raise BackboneFileError(
            f"{path.parent} cannot be written to ({error}). Set CMAP_DEFENSE_CACHE to a folder with room."
        ) from error
    try:
        yield
    finally:
        lock.release()


def pinned(entry: RegistryEntry) -> RegistryEntry:
    """The entry with the commits and checksums that were verified on this machine, where it names none itself."""
    pins = _read_pins().get(entry.name, {})
    return dataclasses.replace(entry, sources=tuple(_with_pin(source, pins) for source in entry.sources))


def pin(name: str, source: Source, **found: str) -> Path:
    """Remember a commit and checksum for a name's source. Returns the file."""
    path = cache_folder() / _PINS
    with locked(path, "the list of verified backbones"):
        pins = _read_pins()
        pins.setdefault(name, {})[source.address] = found
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(pins, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return path


def _with_pin(source: Source, pins: dict[str, Any]) -> Source:
    found = pins.get(source.address)
    if not isinstance(found, dict) or not isinstance(source, (HubRepository, OfficialFile)):
        return source
    if isinstance(source, HubRepository):
        if source.revision not in (None, found.get("revision")):
            return source  # verified at another commit than the one that is named now
        return dataclasses.replace(
            source, revision=source.revision or found.get("revision"), sha256=source.sha256 or found.get("sha256")
        )
    return dataclasses.replace(source, sha256=source.sha256 or found.get("sha256"))


def _read_pins() -> dict[str, Any]:
    path = cache_folder() / _PINS
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BackboneFileError(
            f"{path} cannot be read ({error}). Remove it, and verify the backbones again."
        ) from error
    if not isinstance(pins, dict) or not all(isinstance(value, dict) for value in pins.values()):
        raise BackboneFileError(f"{path} is not a list of verified backbones. Remove it, and verify them again.")
    return pins
