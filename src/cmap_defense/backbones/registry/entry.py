"""What the registry knows about a backbone: frozen records, no network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cmap_defense.backbones.ncsnpp import NCSNppConfig
from cmap_defense.backbones.record import KINDS
from cmap_defense.errors import SettingsError
from cmap_defense.settings import require_choice, require_integer

__all__ = ["HubRepository", "LocalFolder", "OfficialFile", "RegistryEntry", "Source"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SHA256, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalFolder:
    """A backbone folder on this machine, such as the one in the package."""

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

    repo_id: organisation/name. revision: the commit, 40 hexadecimal digits; None for the newest, which may change.
    sha256: of the weights file; None when nobody has checked it.
    """

    repo_id: str
    revision: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id):
            raise SettingsError(f"HubRepository.repo_id must be organisation/name, but is {self.repo_id!r}.")
        if self.revision is not None and not (isinstance(self.revision, str) and _COMMIT.fullmatch(self.revision)):
            raise SettingsError(f"HubRepository.revision must be a commit of 40 digits, but is {self.revision!r}.")
        _require_sha256("HubRepository", self.sha256)

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

    url: of the file. size: in bytes, sha256: both None when nobody has checked them.
    about: its size, and how long it may take, in words, for the message before the download.
    config: the network's architecture. params: which weights in the file.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    about: str = "0.9 GB, a minute and a half at 10 MB/s"
    config: NCSNppConfig = dataclasses.field(default_factory=NCSNppConfig)
    params: str = "params_ema"

    def __post_init__(self) -> None:
        if not self.url.startswith(("https://", "http://")):
            raise SettingsError(f"OfficialFile.url must be a web address, but is {self.url!r}.")
        if self.size is not None:
            require_integer("OfficialFile", "size", self.size, minimum=1)
        _require_sha256("OfficialFile", self.sha256)

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
    """A name and what stands behind it.

    name: letters, digits, dots, dashes and underscores. description: one line, for people.
    sources: where it comes from, tried in this order.
    image_shape: (C, H, W). num_classes: of a class-conditional model, or None.
    kind: "consistency", or "denoiser" for a model without a one-step generator.
    licence: of the weights. paper: where the model comes from.
    settings: the CMAP settings to use with it, as changes to the defaults.
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
    quality: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise SettingsError(
                "RegistryEntry.name must begin with a letter or digit and hold letters, digits, '.', '-', '_', but is "
                f"{self.name!r}."
            )
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources or not all(
            isinstance(source, (LocalFolder, HubRepository, OfficialFile)) for source in self.sources
        ):
            raise SettingsError(
                "RegistryEntry.sources must hold LocalFolder, HubRepository or OfficialFile objects, one at least, "
                f"but is {self.sources!r}."
            )
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        if len(self.image_shape) != 3:
            raise SettingsError(f"RegistryEntry.image_shape must be (C, H, W), but is {self.image_shape!r}.")
        for size in self.image_shape:
            require_integer("RegistryEntry", "image_shape", size, minimum=1)
        if self.num_classes is not None:
            require_integer("RegistryEntry", "num_classes", self.num_classes, minimum=1)
        require_choice("RegistryEntry", "kind", self.kind, KINDS)
        for name in ("settings", "quality"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def verified(self) -> bool:
        """Whether what the first source holds was checked by somebody: its commit, where it has one, and checksum."""
        return self.sources[0].verified

    def __reduce__(self) -> Any:
        """Pickled and copied by its fields; the read-only mappings cannot be."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return (_entry_of, ({name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()},))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "name": self.name,
            "description": self.description,
            "kind": self.kind,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "licence": self.licence,
            "paper": self.paper,
            "settings": dict(self.settings),
            "quality": dict(self.quality),
            "notes": self.notes,
            "verified": self.verified,
            "sources": [_source_dict(source) for source in self.sources],
        }


def _entry_of(values: dict[str, Any]) -> RegistryEntry:
    return RegistryEntry(**values)


def _source_dict(source: Source) -> dict[str, Any]:
    values: dict[str, Any] = {"type": type(source).__name__, "verified": source.verified}
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        values[field.name] = value.to_dict() if isinstance(value, NCSNppConfig) else value
    return values | ({"folder": str(values["folder"])} if "folder" in values else {})


def _require_sha256(owner: str, value: str | None) -> None:
    if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise SettingsError(f"{owner}.sha256 must be 64 hexadecimal digits, but is {value!r}.")
