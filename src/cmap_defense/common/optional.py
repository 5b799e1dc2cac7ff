"""Optional dependencies: the module, or an error that names the extra that installs it."""

from __future__ import annotations

import importlib
from typing import Any

from cmap_defense.errors import MissingExtraError


def optional_import(module: str, extra: str, purpose: str) -> Any:
    """An optional dependency.

    Args:
        module: dotted name to import, such as "matplotlib.style".
        extra: name of the extra of this package that installs it.
        purpose: what needs it, the beginning of the error, such as "The plots of a report".

    Raises:
        MissingExtraError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose}: this needs {name}, which cannot be imported ({error}): pip install 'cmap-defense[{extra}]'."
        ) from error
