"""What is known about a backbone, as it is in ``backbone.json`` beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError

KINDS = ("consistency", "denoiser")
"""A consistency model generates in one step and denoises; a denoiser has no one-step generator."""

PRESETS = ("paper", "balanced", "fast")
"""Purifiers by name; "paper" is CMAP as published, the others are what a backbone's record names."""

_FILE = (r"(?!(?s:.*/)?\.{1,2}(/|$))[^\\:*?\[\]/]+(/[^\\:*?\[\]/]+)*", "a file in the record's folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described(Settings):
    """What a record and a registry entry say of a backbone alike.

    Attributes:
        name: for people.
        description: one line, for people.
        kind: one of ``KINDS``.
        image_shape: (C, H, W).
        num_classes: of a class-conditional model, or None.
        settings: the CMAP settings to use with it, as changes to the defaults.
        presets: purifiers to use with it by name, "balanced" and "fast", each {"purifier": name, **settings}.
        licence: of the weights.
        paper: where the model comes from.
    """

    name: str = setting()
    description: str = setting("")
    kind: str = setting("consistency", choices=KINDS)
    image_shape: tuple[int, int, int] = setting(minimum=1)
    num_classes: int | None = setting(None, minimum=1)
    settings: dict[str, Any] = setting({})
    presets: dict[str, Any] = setting({})
    licence: str = setting("")
    paper: str = setting("")

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if set(self.presets) - set(PRESETS[1:]):
            raise SettingsError(f"{owner}.presets must be {' and '.join(PRESETS[1:])}, but is {self.presets!r}.")
        for name, values in self.presets.items():
            if not isinstance(values, Mapping) or not isinstance(values.get("purifier"), str):
                raise SettingsError(
                    f'{owner}.presets[{name!r}] must be a purifier with its settings, such as {{"purifier": '
                    f'"one-step", "level": 0.5}}, but is {values!r}.'
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRecord(Described):
    """A backbone folder's record; JSON values only, so that it can be read without this package.

    Attributes:
        format: version of this layout.
        network: name of the network's class.
        network_config: its settings.
        noise: sigma_min, sigma_max and sigma_data.
        value_range: of the images that ``generate`` returns.
        weights_file: safetensors, below the record's folder.
        weights_dtype: their precision in the file.
        weights_sha256: of the weights file; empty where nobody recorded it.
        source: where the weights were taken from: address, checksum, converter.
        training: data, command and settings it was trained with.
        figures: what was measured, with the commands.
    """

    format: int = 1
    network: str = setting()
    network_config: dict[str, Any] = setting()
    noise: dict[str, float] = setting()
    value_range: tuple[float, float] = setting((-1.0, 1.0))
    weights_file: str = setting("weights.safetensors", pattern=_FILE)
    weights_dtype: str = setting("float32")
    weights_sha256: str = setting()
    source: dict[str, Any] = setting({})
    training: dict[str, Any] = setting({})
    figures: dict[str, Any] = setting({})

    def __post_init__(self) -> None:
        if self.format != 1:
            raise SettingsError(f"This package reads backbone records of format 1, but this is {self.format!r}.")
        super().__post_init__()
        if self.value_range != (-1.0, 1.0):
            raise SettingsError(f"BackboneRecord.value_range must be (-1, 1), but is {self.value_range!r}.")
