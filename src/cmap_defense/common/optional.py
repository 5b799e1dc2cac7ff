"""Optional dependencies: the module, or an error that names the extra that installs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
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


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for the ``__init__`` of a package: public name -> the module that defines it.

    A module that has the name itself is that name's value. After its first use a name is an ordinary attribute.
    """

    def resolve(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(modules[name])
        value = module if modules[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return resolve, listed
