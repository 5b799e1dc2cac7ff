"""Backbones by name."""

from cmap_defense.backbones.registry.entry import HubRepository, OfficialFile, PackagedFolder, RegistryEntry
from cmap_defense.backbones.registry.names import backbone_names, register, registry_entry

__all__ = [
    "HubRepository",
    "OfficialFile",
    "PackagedFolder",
    "RegistryEntry",
    "backbone_names",
    "register",
    "registry_entry",
]
