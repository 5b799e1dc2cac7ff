"""Paths as options and arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cmap_defense.errors import SettingsError
from cmap_defense.paths import expanded

__all__ = ["PathType"]


class PathType(click.Path):
    """A path; a leading ``~`` is the home folder, also where the shell leaves it as it is (``--out=~/runs``).

    Options are those of ``click.Path``; the value is a ``Path``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        try:
            return super().convert(expanded(value), param, ctx)
        except SettingsError as error:
            self.fail(str(error), param, ctx)
