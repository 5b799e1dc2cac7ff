"""A backbone and the purifier that runs on it: the one that is wanted, or what the backbone's record names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cmap_defense.backbones.base import check_backbone, kind_of
from cmap_defense.backbones.load import entry_of, load_backbone
from cmap_defense.backbones.record import PRESETS
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.settings import require_choice
from cmap_defense.errors import BackboneFileError, SettingsError, UnknownNameError, WrongKindError
from cmap_defense.purifiers.base import Purifier
from cmap_defense.purifiers.chain import Chain
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.purifiers.names import purifier_from_dict
from cmap_defense.purifiers.pair import BackbonePair, members_of

__all__ = ["default_purifier", "lacks_presets", "loaded_with", "preset_purifier", "recorded_settings"]

Unloaded = str | os.PathLike[str] | nn.Module


def loaded_with(
    given: Unloaded | Sequence[Unloaded],
    wanted: Purifier | str | None,
    device: torch.device | None,
    remedy: str = "take a purifier that denoises, such as OneStep (--purifier one-step)",
) -> tuple[nn.Module, Purifier]:
    """A backbone, or a pair, and the purifier that runs on it.

    Args:
        given: as for ``PurifiedClassifier``.
        wanted: a purifier, the name of a preset, or None for the one that goes with the backbone.
        device: where what is loaded here goes; None for the CPU.
        remedy: what to do with a denoiser where CMAP needs a consistency model; empty for nothing.

    Raises:
        WrongKindError, BackboneError, SettingsError: the purifier does not run on it.
        UnknownNameError: there is no backbone of this name, or its record has no such preset.
        BackboneFileError: it cannot be loaded.
    """
    kind = wanted.kind if isinstance(wanted, Purifier) else None
    if wanted == PRESETS[0] or (wanted is None and lacks_presets(given)):
        kind = CMAP().kind  # known before anything is fetched
    try:
        loaded = _loaded(given, kind, device)
        if not isinstance(wanted, Purifier):
            wanted = default_purifier(loaded) if wanted is None else preset_purifier(loaded, wanted)
        wanted.check(loaded)
    except WrongKindError as error:
        if kind == "denoiser" or isinstance(wanted, Chain) or isinstance(given, (tuple, list)) or not remedy:
            raise
        raise WrongKindError(f"{error} With this one, {remedy}.") from error
    return loaded, wanted


def lacks_presets(given: Any) -> bool:
    """Whether it is known without fetching it that a backbone's record names no purifier."""
    entry = None if isinstance(given, (nn.Module, tuple, list)) else entry_of(given)
    return entry is not None and not entry.presets


def _loaded(given: Any, kind: str | None, device: torch.device | None) -> nn.Module:
    if isinstance(given, (tuple, list)):
        return BackbonePair.of([_loaded(one, None, device) for one in given])
    if not isinstance(given, (str, os.PathLike)):
        return check_backbone(given, None)
    loaded = load_backbone(given, kind=kind)
    return loaded if device is None else loaded.to(device)


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
    known = _named(backbone)
    consistent = [member for member in members_of(backbone) if kind_of(member) == "consistency"]
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


def default_purifier(backbone: nn.Module) -> Purifier:
    """What purifies where nobody says what: the record's "balanced", else its "fast", else CMAP as the record has it.

    Args:
        backbone: a backbone, or a pair.

    Raises:
        BackboneFileError: what the record names is not valid.
    """
    for name in PRESETS[1:]:
        if name in _named(backbone):
            return preset_purifier(backbone, name)
    return CMAP(recorded_settings(CMAP().member(backbone)))


def _named(backbone: nn.Module) -> Mapping[str, Mapping[str, Any]]:
    """The presets of the records by name; of a pair those that run on the backbone whose they are, and the consistency
    model's before the denoiser's."""
    found: dict[str, Mapping[str, Any]] = {}
    for member in reversed(members_of(backbone)):
        presets = getattr(getattr(member, "record", None), "presets", {})
        found |= {name: preset for name, preset in presets.items() if _runs_on(member, preset, backbone)}
    return found


def _runs_on(member: nn.Module, preset: Mapping[str, Any], backbone: nn.Module) -> bool:
    """Whether a preset's purifier takes this one of the backbones; also where it is not valid, or a chain."""
    try:
        purifier = purifier_from_dict(preset)
    except (SettingsError, UnknownNameError, TypeError):
        return True
    return isinstance(purifier, Chain) or purifier.member(backbone) is member
