"""The purifiers that a backbone's record names, and its settings of CMAP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cmap_defense.backbones.base import kind_of
from cmap_defense.backbones.record import PRESETS
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.settings import require_choice
from cmap_defense.errors import BackboneFileError, SettingsError, UnknownNameError
from cmap_defense.purifiers.base import Purifier
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.purifiers.names import purifier_from_dict
from cmap_defense.purifiers.pair import BackbonePair

__all__ = ["preset_purifier", "recorded_settings"]


def recorded_settings(backbone: nn.Module) -> CMAPSettings:
    """The settings of CMAP that a backbone's record names, as changes to the defaults.

    Raises:
        BackboneFileError: they are not valid.
    """
    try:
        return CMAPSettings.from_dict(getattr(backbone, "default_settings", None) or {})
    except SettingsError as error:
        raise BackboneFileError(f"The settings in the backbone's record are not valid: {error}") from error


def preset_purifier(backbone: nn.Module, name: str) -> Purifier:
    """The purifier of a preset.

    Args:
        backbone: a backbone, or a pair; the preset may be of the record of either.
        name: "paper" for CMAP as published, with the constants in the record, on any consistency model; "balanced" or
            "fast" for what the record names.

    Raises:
        SettingsError: there is no preset of this name.
        UnknownNameError: the record does not name it; the message lists those that there are.
        BackboneFileError: what it names is not valid.
    """
    require_choice("PurifiedClassifier", "preset", name, PRESETS)
    members = (backbone.consistency, backbone.denoiser) if isinstance(backbone, BackbonePair) else (backbone,)
    known: dict[str, Mapping[str, Any]] = {}
    for member in reversed(members):
        known |= getattr(getattr(member, "record", None), "presets", {})
    consistent = [member for member in members if kind_of(member) == "consistency"]
    if name == PRESETS[0] and consistent:
        return CMAP(recorded_settings(consistent[0]).as_published())
    if name not in known:
        there = [*(PRESETS[:1] if consistent else ()), *sorted(known)]
        raise UnknownNameError(
            f"The backbone has no preset {name!r}, "
            + (f"but has {', '.join(map(repr, there))}." if there else "nor any other.")
            + " Take another purifier, such as OneStep (--purifier one-step)."
        )
    try:
        return purifier_from_dict(known[name])
    except (SettingsError, UnknownNameError, TypeError) as error:
        raise BackboneFileError(f"The preset {name!r} in the backbone's record is not valid: {error}") from error
