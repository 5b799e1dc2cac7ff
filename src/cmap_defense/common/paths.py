"""Paths that begin at the home folder, which an account in a container may not have."""

from __future__ import annotations

import os
from pathlib import Path

from cmap_defense.errors import SettingsError


def home(instead: str) -> Path:
    """The home folder; an error names the variable that spares the caller one."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise SettingsError(
            f"This account has no home folder: set the environment variable {instead}, or HOME, to a folder of yours."
        ) from error


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SettingsError(
            f"{os.fspath(path)} begins at a home folder that is not known here: give the path in full, or set the "
            "environment variable HOME."
        ) from error


def hub_folder() -> Path:
    """The folder of torch.hub's downloads, which ``TORCH_HOME`` moves."""
    import torch

    folder = torch.hub.get_dir()
    if folder.startswith("~"):  # torch leaves it so where there is no home folder
        home("TORCH_HOME")
    return Path(folder)
