"""What is known about a backbone, as it is in ``backbone.json`` beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cmap_defense.common.settings import Settings, require_choice, require_integer
from cmap_defense.errors import SettingsError

KINDS = ("consistency", "denoiser")
"""A consistency model generates in one step and denoises; a denoiser has no one-step generator."""

PRESETS = ("paper", "balanced", "fast")
"""Purifiers by name; "paper" is CMAP as published, the others are what a backbone's record names."""


def require_presets(owner: str, presets: Any) -> None:
    """Raises ``SettingsError`` unless presets are purifiers by name, each {"purifier": name, **settings}."""
    if not isinstance(presets, Mapping) or set(presets) - set(PRESETS[1:]):
        raise SettingsError(f"{owner}.presets must be an object with {' and '.join(PRESETS[1:])}, but is {presets!r}.")
    for name, values in presets.items():
        if not isinstance(values, Mapping) or not isinstance(values.get("purifier"), str):
            raise SettingsError(
                f'{owner}.presets[{name!r}] must be a purifier with its settings, such as {{"purifier": "one-step", '
                f'"level": 0.5}}, but is {values!r}.'
            )


def require_image_shape(owner: str, shape: Any, num_classes: Any = None) -> tuple[int, int, int]:
    """``shape`` as (C, H, W), or a ``SettingsError`` that names the setting; likewise for ``num_classes``."""
    if not isinstance(shape, (list, tuple)) or len(shape) != 3:
        raise SettingsError(f"{owner}.image_shape must be (C, H, W), but is {shape!r}.")
    channels, height, width = (require_integer(owner, "image_shape", size, minimum=1) for size in shape)
    if num_classes is not None:
        require_integer(owner, "num_classes", num_classes, minimum=1)
    return channels, height, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRecord(Settings):
    """A backbone folder's record; JSON values only, so that it can be read without this package.

    Attributes:
        format: version of this layout.
        name: for people.
        description: one line, for people.
        kind: one of ``KINDS``.
        network: name of the network's class.
        network_config: its settings.
        noise: sigma_min, sigma_max and sigma_data.
        image_shape: (C, H, W).
        num_classes: of a class-conditional model, or None.
        value_range: of the images that ``generate`` returns.
        weights_file: safetensors, below the record's folder.
        weights_dtype: their precision in the file.
        weights_sha256: of the weights file; empty where nobody recorded it.
        settings: the CMAP settings to use with it, as changes to the defaults.
        presets: purifiers to use with it by name, "balanced" and "fast", each {"purifier": name, **settings}.
        source: where the weights were taken from: address, checksum, converter.
        training: data, command and settings it was trained with.
        figures: what was measured, with the commands.
        licence: of the weights.
        paper: where the method comes from.
    """

    format: int = 1
    name: str
    description: str = ""
    kind: str = "consistency"
    network: str
    network_config: dict[str, Any]
    noise: dict[str, float]
    image_shape: tuple[int, int, int]
    num_classes: int | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    weights_file: str = "weights.safetensors"
    weights_dtype: str = "float32"
    weights_sha256: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    presets: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    licence: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        if self.format != 1:
            raise SettingsError(
                f"This package reads backbone records of format 1, but this one has format {self.format!r}."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = {"str": str, "dict": dict}.get(str(field.type).partition("[")[0])
            if kind is not None and not isinstance(value, kind):
                what = "text" if kind is str else "an object"
                raise SettingsError(f"BackboneRecord.{field.name} must be {what}, but is {value!r}.")
        if self.value_range not in ((-1.0, 1.0), [-1.0, 1.0]):
            raise SettingsError(f"BackboneRecord.value_range must be (-1, 1), but is {self.value_range!r}.")
        object.__setattr__(self, "value_range", tuple(self.value_range))
        shape = require_image_shape("BackboneRecord", self.image_shape, self.num_classes)
        object.__setattr__(self, "image_shape", shape)
        require_choice("BackboneRecord", "kind", self.kind, KINDS)
        require_presets("BackboneRecord", self.presets)
        parts = self.weights_file.split("/")
        if set(self.weights_file) & set("\\:*?[]") or any(part in ("", ".", "..") for part in parts):
            raise SettingsError(
                f"BackboneRecord.weights_file must be a file in the record's folder, but is {self.weights_file!r}."
            )
