"""Backbones by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cmap_defense.backbones.folder import read_record
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.errors import SettingsError, UnknownNameError
from cmap_defense.settings import near_matches

__all__ = ["RegistryEntry", "backbone_names", "registry_entry"]

_ASSETS = Path(__file__).parent.parent / "assets"


@dataclasses.dataclass(frozen=True)
class RegistryEntry:
    """A name and the folder that it stands for."""

    name: str
    folder: Path

    @property
    def record(self) -> BackboneRecord:
        """Read from the folder. Raises BackboneFileError when it is damaged."""
        return read_record(self.folder)


_ENTRIES: Mapping[str, RegistryEntry] = {
    entry.name: entry for entry in (RegistryEntry("fashion-mnist-ct", _ASSETS / "fashion-mnist-ct"),)
}


def backbone_names() -> list[str]:
    """All names, sorted."""
    return sorted(_ENTRIES)


def registry_entry(name: str) -> RegistryEntry:
    """The entry of a name. Raises :class:`UnknownNameError` with near matches."""
    if not isinstance(name, str) or not name:
        raise SettingsError(f"A backbone's name must be text, but is {name!r}.")
    if name not in _ENTRIES:
        raise UnknownNameError(
            f"There is no backbone {name!r}.{near_matches(name, _ENTRIES)} A backbone may also be a Hub id "
            "(organisation/name) or a folder; `cmap-defense backbones list` shows the names."
        )
    return _ENTRIES[name]
