"""Backbones by name."""

from cmap_defense.backbones.registry.entry import HubRepository, LocalFolder, OfficialFile, RegistryEntry
from cmap_defense.backbones.registry.names import backbone_names, register, registry_entry

__all__ = [
    "HubRepository",
    "LocalFolder",
    "OfficialFile",
    "RegistryEntry",
    "backbone_names",
    "register",
    "registry_entry",
]
