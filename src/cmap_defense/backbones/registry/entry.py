"""What the registry knows about a backbone: frozen records, no network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cmap_defense.backbones.ncsnpp import NCSNppConfig
from cmap_defense.backbones.record import KINDS, require_image_shape, require_presets
from cmap_defense.common.settings import require_choice, require_integer
from cmap_defense.errors import SettingsError

_SHA256, _COMMIT = "[0-9a-f]{64}", "[0-9a-f]{40}"


def _require_text(owner: str, name: str, value: Any, pattern: str, what: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise SettingsError(f"{owner}.{name} must be {what}, but is {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalFolder:
    """A backbone folder on this machine, such as the one in the package.

    Attributes:
        folder: with ``backbone.json``, or a pipeline of the diffusers library.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def verified(self) -> bool:
        """Whether the folder has a record of its own, with a checksum."""
        return (self.folder / "backbone.json").is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubRepository:
    """A repository of the Hugging Face Hub, a backbone folder of ours or a pipeline of the diffusers library.

    Attributes:
        repo_id: organisation/name.
        revision: the commit, 40 hexadecimal digits; None for the newest, which may change.
        sha256: of the weights file; None when nobody has checked it.
    """

    repo_id: str
    revision: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        _require_text("HubRepository", "repo_id", self.repo_id, r"[\w.-]+/[\w.-]+", "organisation/name")
        if self.revision is not None:
            _require_text("HubRepository", "revision", self.revision, _COMMIT, "a commit of 40 digits")
        if self.sha256 is not None:
            _require_text("HubRepository", "sha256", self.sha256, _SHA256, "64 hexadecimal digits")

    @property
    def address(self) -> str:
        """organisation/name."""
        return self.repo_id

    @property
    def verified(self) -> bool:
        """Whether both the commit and the checksum are known."""
        return self.revision is not None and self.sha256 is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """A checkpoint as its authors publish it, fetched once and converted once.

    Attributes:
        url: of the file.
        size: in bytes; None when nobody has checked it.
        sha256: of the file; None when nobody has checked it.
        about: its size, and how long it may take, in words, for the message before the download.
        config: the network's architecture.
        params: which weights in the file.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    about: str = "0.9 GB, a minute and a half at 10 MB/s"
    config: NCSNppConfig = dataclasses.field(default_factory=NCSNppConfig)
    params: str = "params_ema"

    def __post_init__(self) -> None:
        _require_text("OfficialFile", "url", self.url, "https?://.*", "a web address")
        if self.size is not None:
            require_integer("OfficialFile", "size", self.size, minimum=1)
        if self.sha256 is not None:
            _require_text("OfficialFile", "sha256", self.sha256, _SHA256, "64 hexadecimal digits")

    @property
    def address(self) -> str:
        """The file's address."""
        return self.url

    @property
    def verified(self) -> bool:
        """Whether the checksum is known."""
        return self.sha256 is not None


Source = LocalFolder | HubRepository | OfficialFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegistryEntry:
    """A name and the model that it stands for.

    Attributes:
        name: letters, digits, dots, dashes and underscores.
        description: one line, for people.
        sources: where it comes from, tried in this order.
        image_shape: (C, H, W).
        num_classes: of a class-conditional model, or None.
        kind: "consistency", or "denoiser" for a model without a one-step generator.
        licence: of the weights.
        paper: where the model comes from.
        settings: the CMAP settings to use with it, as changes to the defaults.
        presets: purifiers to use with it, as in ``BackboneRecord``.
        quality: measured or cited figures, each with where it comes from.
        notes: what a user should know before choosing it.

    Raises:
        SettingsError: a field is not as above.
    """

    name: str
    description: str
    sources: tuple[Source, ...]
    image_shape: tuple[int, int, int]
    num_classes: int | None = None
    kind: str = "consistency"
    licence: str = ""
    paper: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quality: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        signs = "letters, digits, '.', '-', '_', the first a letter or digit"
        _require_text("RegistryEntry", "name", self.name, r"[A-Za-z0-9][A-Za-z0-9_.-]*", signs)
        sources = tuple(self.sources)
        if not sources or not all(isinstance(source, Source) for source in sources):
            raise SettingsError(
                "RegistryEntry.sources must hold LocalFolder, HubRepository or OfficialFile objects, one at least, "
                f"but is {self.sources!r}."
            )
        object.__setattr__(self, "sources", sources)
        shape = require_image_shape("RegistryEntry", self.image_shape, self.num_classes)
        object.__setattr__(self, "image_shape", shape)
        require_choice("RegistryEntry", "kind", self.kind, KINDS)
        require_presets("RegistryEntry", self.presets)
        for name in ("settings", "presets", "quality"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def verified(self) -> bool:
        """Whether what the first source holds was checked by somebody: its commit, where it has one, and checksum."""
        return self.sources[0].verified

    def __reduce__(self) -> Any:
        """Pickled and copied by its fields; the read-only mappings cannot be."""
        return (_entry_of, (self._fields(),))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, and whether they are verified."""
        sources = [_source_dict(source) for source in self.sources]
        shape = list(self.image_shape)
        return self._fields() | {"image_shape": shape, "verified": self.verified, "sources": sources}

    def _fields(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _entry_of(values: dict[str, Any]) -> RegistryEntry:
    return RegistryEntry(**values)


def _source_dict(source: Source) -> dict[str, Any]:
    values: dict[str, Any] = {"type": type(source).__name__, "verified": source.verified}
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        value = value.to_dict() if isinstance(value, NCSNppConfig) else value
        values[field.name] = str(value) if isinstance(value, Path) else value
    return values
