"""Optional dependencies: the module, or an error that names the extra that installs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
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


def lazy_names(
    package: str, public: Sequence[str], *modules: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for the ``__init__`` of a package whose public names are imported at their first
    use: each from the first of these modules that has it.

    Modules are named as in an import within the package, such as ".losses" or "..errors"; one that is public itself is
    that name's value.
    """

    def resolve(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if f".{name}" in modules:
            value: Any = importlib.import_module(f".{name}", package)
        else:
            imported = (importlib.import_module(module, package) for module in modules)
            value = next(getattr(module, name) for module in imported if hasattr(module, name))
        setattr(sys.modules[package], name, value)
        return value

    return resolve, lambda: sorted({*vars(sys.modules[package]), *public})
