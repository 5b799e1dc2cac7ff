"""Features of a classifier: the input of its last linear layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import evaluating
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import ClassifierError, SettingsError

NAMED = "Name a module whose input is a vector for each image."


def find_features(model: PurifiedClassifier, images: Tensor, module: str | None = None) -> str:
    """The name of the classifier's module whose input is the features; "" for the classifier itself.

    Args:
        model: its classifier must be an nn.Module.
        images: float [B, C, H, W] in [0, 1], on the model's device, one at least: the classifier is run on them.
        module: its name where that is known; None for the ``nn.Linear`` that the classifier calls last.

    Raises:
        ClassifierError: the classifier is no module, or calls no ``nn.Linear`` or not the module named.
        SettingsError: there is no module of that name.
    """
    classifier = model.classifier
    if not isinstance(classifier, nn.Module):
        raise ClassifierError(
            f"Features are read inside an nn.Module, but the classifier is {type(classifier).__name__}: wrap it in one."
        )
    modules = dict(classifier.named_modules())
    if module is not None and module not in modules:
        raise SettingsError(f"The classifier has no module {module!r}.{near_matches(module, [*modules][1:])}")
    linear = {name: part for name, part in modules.items() if isinstance(part, nn.Linear)}
    return _last_input(model, images, linear if module is None else {module: modules[module]})[0]


def read_features(model: PurifiedClassifier, images: Tensor, module: str) -> Tensor:
    """The features of images, normalised for the classifier as the model does it.

    Args:
        model: as ``find_features`` takes it.
        images: float [B, C, H, W] in [0, 1], on the model's device.
        module: what it gives.

    Returns:
        [B, d] on the CPU, float32 at least. What comes into the module as [B, d, H, W] is averaged over H and W.

    Raises:
        ClassifierError: what comes in is no vector, or the module was not called.
    """
    assert isinstance(model.classifier, nn.Module)
    found = _last_input(model, images, {module: model.classifier.get_submodule(module)})[1]
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim in (2, 4) and len(found) == len(images):
        wide = found.detach().to(torch.promote_types(found.dtype, torch.float32))
        return (wide.mean(dim=(2, 3)) if wide.ndim == 4 else wide).cpu()
    came, count = list(found.shape) if isinstance(found, Tensor) else type(found).__name__, len(images)
    raise ClassifierError(f"The input of {module!r} must be [{count}, d] or [{count}, d, H, W], but is {came}. {NAMED}")


def _last_input(model: PurifiedClassifier, images: Tensor, modules: Mapping[str, nn.Module]) -> tuple[str, Any]:
    """Name and first input of the module that is called last of these while the classifier runs on images."""
    inputs: list[tuple[str, Any]] = []

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append((name, next(iter([*args, *named.values()]), None)))

    handles = [
        part.register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True)
        for name, part in modules.items()
    ]
    try:
        with torch.no_grad(), evaluating(model.classifier):
            model.undefended(images)
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        called = f"did not call its module {next(iter(modules))!r}" if len(modules) == 1 else "called no nn.Linear"
        raise ClassifierError(f"{type(model.classifier).__name__} {called} for these images. {NAMED}")
    return inputs[-1]
