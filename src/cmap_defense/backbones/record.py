"""What is known about a backbone, as it stands in ``backbone.json`` beside the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from cmap_defense.errors import SettingsError
from cmap_defense.settings import Settings, require_choice, require_integer

__all__ = ["KINDS", "BackboneRecord"]

KINDS = ("consistency", "denoiser")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRecord(Settings):
    """A backbone folder's record; JSON values only, so that it can be read without this package.

    format: version of this layout. name, description: for people.
    network: which class. network_config: its settings. noise: sigma_min, sigma_max, sigma_data.
    kind: "consistency", or "denoiser" for a model that denoises and has no one-step generator.
    image_shape: (C, H, W). num_classes: of a class-conditional model, or None.
    value_range: of the images that ``generate`` returns.
    weights_file, weights_dtype, weights_sha256: the safetensors file, below the record's folder; the checksum is empty
        where nobody recorded it.
    settings: the CMAP settings to use with it, as changes to the defaults.
    source: where the weights were taken from: address, checksum, converter.
    training: data, command and settings it was trained with. figures: what was measured, with the commands.
    licence: of the weights. paper: where the method comes from.
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
        for name in ("image_shape", "value_range"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise SettingsError(f"BackboneRecord.{name} must be a list, but is {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if len(self.image_shape) != 3:
            raise SettingsError(f"BackboneRecord.image_shape must be (C, H, W), but is {self.image_shape!r}.")
        for size in self.image_shape:
            require_integer("BackboneRecord", "image_shape", size, minimum=1)
        if tuple(self.value_range) != (-1.0, 1.0):
            raise SettingsError(f"BackboneRecord.value_range must be (-1, 1), but is {self.value_range!r}.")
        for name in (
            "name",
            "description",
            "network",
            "weights_file",
            "weights_dtype",
            "weights_sha256",
            "licence",
            "paper",
        ):
            if not isinstance(getattr(self, name), str):
                raise SettingsError(f"BackboneRecord.{name} must be text, but is {getattr(self, name)!r}.")
        for name in ("network_config", "noise", "settings", "source", "training", "figures"):
            if not isinstance(getattr(self, name), dict):
                raise SettingsError(f"BackboneRecord.{name} must be an object, but is {getattr(self, name)!r}.")
        require_choice("BackboneRecord", "kind", self.kind, KINDS)
        if self.num_classes is not None:
            require_integer("BackboneRecord", "num_classes", self.num_classes, minimum=1)
        parts = self.weights_file.split("/")
        if set(self.weights_file) & set("\\:*?[]") or any(part in ("", ".", "..") for part in parts):
            raise SettingsError(
                f"BackboneRecord.weights_file must be a file in the record's folder, but is {self.weights_file!r}."
            )
