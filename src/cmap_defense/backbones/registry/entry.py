"""What the registry knows about a backbone: frozen records, no network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmap_defense.backbones.ncsnpp import NCSNppConfig
from cmap_defense.backbones.record import Described
from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError

_SHA256 = ("[0-9a-f]{64}", "64 hexadecimal digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source(Settings):
    """Where a model comes from; its first field is its address."""

    @property
    def address(self) -> str:
        """The folder, organisation/name, or web address."""
        return str(getattr(self, dataclasses.fields(self)[0].name))

    @property
    def verified(self) -> bool:
        """Whether somebody has checked what is there: its checksum is known, and its commit where it has one."""
        return all(getattr(self, name, "") is not None for name in ("revision", "sha256"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalFolder(_Source):
    """A backbone folder on this machine, such as the one in the package.

    Attributes:
        folder: with ``backbone.json``, or a pipeline of the diffusers library.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def verified(self) -> bool:
        """Whether the folder has a record of its own, with a checksum."""
        return (self.folder / "backbone.json").is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubRepository(_Source):
    """A repository of the Hugging Face Hub, a backbone folder of ours or a pipeline of the diffusers library.

    Attributes:
        repo_id: organisation/name.
        revision: the commit, 40 hexadecimal digits; None for the newest, which may change.
        sha256: of the weights file; None when nobody has checked it.
    """

    repo_id: str = setting(pattern=(r"[\w.-]+/[\w.-]+", "organisation/name"))
    revision: str | None = setting(None, pattern=("[0-9a-f]{40}", "a commit of 40 digits"))
    sha256: str | None = setting(None, pattern=_SHA256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialFile(_Source):
    """A checkpoint as its authors publish it, fetched once and converted once.

    Attributes:
        url: of the file.
        size: in bytes; None when nobody has checked it.
        sha256: of the file; None when nobody has checked it.
        about: its size, and how long it may take, in words, for the message before the download.
        config: the network's architecture.
        params: which weights in the file.
    """

    url: str = setting(pattern=("https?://.*", "a web address"))
    size: int | None = setting(None, minimum=1)
    sha256: str | None = setting(None, pattern=_SHA256)
    about: str = "0.9 GB, a minute and a half at 10 MB/s"
    config: NCSNppConfig = dataclasses.field(default_factory=NCSNppConfig)
    params: str = "params_ema"


Source = LocalFolder | HubRepository | OfficialFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegistryEntry(Described):
    """A name and the model that it stands for. What is not below is as in ``BackboneRecord``.

    Attributes:
        name: letters, digits, dots, dashes and underscores.
        sources: where it comes from, tried in this order.
        quality: measured or cited figures, each with where it comes from.
        notes: what a user should know before choosing it.

    Raises:
        SettingsError: a field is not as above.
    """

    name: str = setting(
        pattern=(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "letters, digits, '.', '-', '_', the first a letter or digit")
    )
    sources: tuple[Source, ...]
    quality: Mapping[str, Any] = setting({})
    notes: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources or not all(isinstance(source, Source) for source in self.sources):
            raise SettingsError(
                "RegistryEntry.sources must hold LocalFolder, HubRepository or OfficialFile objects, one at least, "
                f"but is {self.sources!r}."
            )

    @property
    def verified(self) -> bool:
        """Whether what the first source holds was checked by somebody: its commit, where it has one, and checksum."""
        return self.sources[0].verified

    def described(self) -> dict[str, Any]:
        """The fields that a backbone's record takes over."""
        names = ("description", "settings", "presets", "licence", "paper")
        return {name: getattr(self, name) for name in names} | {"figures": self.quality}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, and whether they are verified."""
        sources = [{"type": type(s).__name__, "verified": s.verified, **s.to_dict()} for s in self.sources]
        return super().to_dict() | {"verified": self.verified, "sources": sources}
