"""Models that a command is given by name: an import path, and a file with their weights."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from cmap_defense.backbones.weights import read_state_dict
from cmap_defense.cli.choices import EMBEDDED
from cmap_defense.embedded import load_classifier
from cmap_defense.errors import BackboneFileError

__all__ = ["imported_model", "state_dict_of"]


PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before the names in a state dict: DataParallel, torch.compile, Lightning."""


def imported_model(path: str, weights: Path | None, device: torch.device, option: str) -> Callable[[Tensor], Tensor]:
    """The model at an import path, in eval mode, on a device.

    Args:
        path: ``package.module:name`` or ``file.py:name``, where name is a function or class without arguments that
            makes the model, or the model itself; or "embedded". The current folder is searched first.
        weights: a file with its state dict, of safetensors or of ``torch.save``; None to leave it as it is. See
            :func:`state_dict_of`.
        device: where to.
        option: what the user called it, for errors.

    Raises:
        click.BadParameter: there is nothing there, or no model, or the weights are those of another.
    """
    made = load_classifier() if path == EMBEDDED else _made(_named(path, option), path, option)
    if weights is not None:
        _load(made, weights, "--weights" if option == "--classifier" else option)
    if isinstance(made, nn.Module):
        made = made.to(device).eval().requires_grad_(False)
    return made


def state_dict_of(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The state dict in a file, under the names that a model has.

    Args:
        path: of safetensors or of ``torch.save``, of which nothing is executed. The state dict may be an entry
            "state_dict", "model_state_dict", "model" or "net" of what was saved.
        names: of the model. A prefix of :data:`PREFIXES` that all names in the file have and the model's have not is
            taken off.

    Raises:
        BackboneFileError: the file is damaged, or holds something else.
    """
    state, known = read_state_dict(path), list(names)
    while state:
        prefix = next((p for p in PREFIXES if all(n.startswith(p) for n in state)), None)
        if prefix is None or any(name.startswith(prefix) for name in known):
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _made(named: Any, path: str, option: str) -> Any:
    """The model itself, or what a call without arguments makes."""
    if isinstance(named, nn.Module):
        return named
    if not callable(named):
        raise click.BadParameter(f"{path} is no model and no function that makes one.", param_hint=option)
    try:
        inspect.signature(named).bind()
    except TypeError as error:
        raise click.BadParameter(
            f"{path} cannot be called without arguments ({error}). Name a function that makes your model.",
            param_hint=option,
        ) from error
    except ValueError:  # a function in C that does not say
        pass
    made = _of_user(named, path, option)
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
    module = _of_user(lambda: _module(module_name), module_name, option)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise click.BadParameter(f"{module_name} has no {name}.", param_hint=option)
        value = getattr(value, part)
    return value


def _of_user(code: Callable[[], Any], name: str, option: str) -> Any:
    """What code of the user's gives; wrong usage, in one sentence, when it raises."""
    try:
        return code()
    except (Exception, SystemExit) as error:
        where = "cannot be imported" if isinstance(error, ImportError) else f"raised {type(error).__name__}"
        raise click.BadParameter(f"{name} {where}: {error}", param_hint=option) from error


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
    wanted = model.state_dict()
    try:
        state = state_dict_of(weights, wanted)
    except BackboneFileError as error:
        raise click.BadParameter(str(error), param_hint=option) from error
    wrong = {
        "does not hold": [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")],
        "holds besides": [name for name in state if name not in wanted],
        "has other shapes for": [n for n in wanted if n in state and state[n].shape != wanted[n].shape],
    }
    told = "; ".join(f"it {what} {', '.join(names[:3])}" for what, names in wrong.items() if names)
    if told:
        raise click.BadParameter(f"{weights} is not of this model: {told}.", param_hint=option)
    model.load_state_dict(state, strict=False)  # counts of batches may be missing, which eval mode does not use
