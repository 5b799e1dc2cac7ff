"""Backbones by name: those of the catalogue, and those that a program registers."""

from __future__ import annotations

import functools

from cmap_defense.backbones.registry.catalogue import catalogue
from cmap_defense.backbones.registry.entry import HubRepository, LocalFolder, OfficialFile, RegistryEntry
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import SettingsError, UnknownNameError

__all__ = [
    "HubRepository",
    "LocalFolder",
    "OfficialFile",
    "RegistryEntry",
    "backbone_names",
    "names_of_kind",
    "register",
    "registry_entry",
]


def backbone_names() -> list[str]:
    """All names, sorted."""
    return sorted(_entries())


def names_of_kind(kind: str) -> str:
    """The names of a kind of backbone as text: those of the package, and how many others there are."""
    entries = [entry for entry in _entries().values() if entry.kind == kind]
    here = [entry.name for entry in entries if isinstance(entry.sources[0], LocalFolder)]
    others = len(entries) - len(here)
    return f"{', '.join(sorted(here))}, and {others} more that `cmap-defense backbones list` shows"


def registry_entry(name: str) -> RegistryEntry:
    """The entry of a name. Raises ``UnknownNameError`` with near matches."""
    if not isinstance(name, str) or not name:
        raise SettingsError(f"A backbone's name must be text, but is {name!r}.")
    if name not in _entries():
        raise UnknownNameError(
            f"There is no backbone {name!r}.{near_matches(name, _entries())} A backbone may also be a Hub id "
            "(organisation/name) or a folder; `cmap-defense backbones list` shows the names."
        )
    return _entries()[name]


def register(entry: RegistryEntry, *, replace: bool = False) -> None:
    """Give a backbone a name in this process.

    Args:
        entry: the name, and where the model comes from.
        replace: whether a name that is taken already may be taken over.

    Raises:
        SettingsError: the name is taken, or ``entry`` is none.
    """
    if not isinstance(entry, RegistryEntry):
        raise SettingsError(f"register takes a RegistryEntry, but got {type(entry).__name__}.")
    if entry.name in _entries() and not replace:
        raise SettingsError(
            f"There is a backbone {entry.name!r} already; give another name, or register(..., replace=True)."
        )
    _entries()[entry.name] = entry


@functools.cache
def _entries() -> dict[str, RegistryEntry]:
    return {entry.name: entry for entry in catalogue()}
