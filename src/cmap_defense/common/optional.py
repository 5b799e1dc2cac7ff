"""Optional dependencies: the module, or an error that names the extra that installs it."""

from __future__ import annotations

import importlib
from typing import Any

from cmap_defense.errors import MissingExtraError


def optional_import(module: str, extra: str, purpose: str) -> Any:
    """An optional dependency, or an error that begins with its purpose and names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose}: this needs {name}, which cannot be imported ({error}): pip install 'cmap-defense[{extra}]'."
        ) from error
