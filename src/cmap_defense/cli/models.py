"""Models that a command is given by name: an import path, and a file with their weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmap_defense.embedded import load_classifier

__all__ = ["EMBEDDED", "imported_model"]

EMBEDDED = "embedded"
"""The name of what ships with the package."""


def imported_model(path: str, weights: Path | None, device: torch.device, option: str) -> Callable[[Tensor], Tensor]:
    """The model at an import path, in eval mode, on a device.

    Args:
        path: ``package.module:name`` or ``file.py:name``, where name is a function or class without arguments that
            makes the model, or the model itself; or "embedded". The current folder is searched first.
        weights: a safetensors file with its state dict; None to leave it as it is.
        device: where to.
        option: what the user called it, for errors.

    Raises:
        click.BadParameter: there is nothing there, or no model, or the weights are those of another.
    """
    made = load_classifier() if path == EMBEDDED else _made(_named(path, option), path, option)
    if weights is not None:
        _load(made, weights, option)
    if isinstance(made, nn.Module):
        made = made.to(device).eval().requires_grad_(False)
    return made


def _made(named: Any, path: str, option: str) -> Any:
    """The model itself, or what a call without arguments makes."""
    if isinstance(named, nn.Module):
        return named
    if not callable(named):
        raise click.BadParameter(f"{path} is no model and no function that makes one.", param_hint=option)
    made: Any
    try:
        made = named()
    except TypeError as error:
        raise click.BadParameter(
            f"{path} cannot be called without arguments ({error}). Name a function that makes your model.",
            param_hint=option,
        ) from error
    if not callable(made):
        raise click.BadParameter(f"{path} made {type(made).__name__}, which is no model.", param_hint=option)
    return made


def _named(path: str, option: str) -> Any:
    """What an import path names."""
    module_name, _, name = path.rpartition(":")
    if not module_name or not name:
        raise click.BadParameter(
            f"{path!r} is no import path such as my_models:resnet or my_models.py:resnet.", param_hint=option
        )
    try:
        module = _module(module_name)
    except ImportError as error:
        raise click.BadParameter(f"{module_name} cannot be imported: {error}", param_hint=option) from error
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise click.BadParameter(f"{module_name} has no {name}.", param_hint=option)
        value = getattr(value, part)
    return value


def _module(name: str) -> Any:
    if name.endswith(".py"):
        file = Path(name)
        if not file.is_file():
            raise ImportError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _load(model: Any, weights: Path, option: str) -> None:
    if not isinstance(model, nn.Module):
        raise click.BadParameter("there is no module to load weights into.", param_hint=option)
    try:
        missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise click.BadParameter(f"{weights} cannot be loaded into it: {error}", param_hint=option) from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # counts, of no use in eval mode
    if missing or unexpected:
        wrong = {"does not hold": missing, "holds besides": list(unexpected)}
        told = "; ".join(f"it {what} {', '.join(names[:3])}" for what, names in wrong.items() if names)
        raise click.BadParameter(f"{weights} is not of this model: {told}.", param_hint=option)
