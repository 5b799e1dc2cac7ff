"""Features of a classifier: the input of its last linear layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import evaluating
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import ClassifierError, SettingsError

NAMED = "Name a module whose input is a vector for each image."


@dataclasses.dataclass(frozen=True)
class FeatureLayer:
    """Where features are read.

    Attributes:
        module: name of the classifier's module whose input the features are; "" for the classifier itself.
        numbers: d, the length of a feature vector.
    """

    module: str
    numbers: int


def find_features(model: PurifiedClassifier, images: Tensor, module: str | None = None) -> FeatureLayer:
    """Where the features of a model's classifier are.

    Args:
        model: its classifier must be an nn.Module.
        images: float [B, C, H, W] in [0, 1], on the model's device, one at least: the classifier is run on them.
        module: the name of the module whose input is wanted; None for the ``nn.Linear`` that the classifier calls last.

    Raises:
        ClassifierError: the classifier is no module, calls no ``nn.Linear`` or not the module named, or what comes in
            there is no vector.
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
    chosen = (
        {name: part for name, part in modules.items() if isinstance(part, nn.Linear)}
        if module is None
        else {module: modules[module]}
    )
    inputs = _inputs(model, images, chosen)
    if not inputs:
        raise ClassifierError(
            f"{type(classifier).__name__} called no nn.Linear for these images. {NAMED}"
            if module is None
            else f"{type(classifier).__name__} did not call its module {module!r} for these images. {NAMED}"
        )
    name, found = inputs[-1]
    return FeatureLayer(name, _vectors(found, len(images), name).shape[1])


def read_features(model: PurifiedClassifier, images: Tensor, layer: FeatureLayer) -> Tensor:
    """The features of images, normalised for the classifier as the model does it.

    Args:
        model: as ``find_features`` takes it.
        layer: as it gives it.
        images: float [B, C, H, W] in [0, 1], on the model's device.

    Returns:
        [B, d] on the CPU, float32 at least. What comes into the layer as [B, d, H, W] is averaged over H and W.

    Raises:
        ClassifierError: what comes in is no vector, or was not called.
    """
    assert isinstance(model.classifier, nn.Module)
    inputs = _inputs(model, images, {layer.module: model.classifier.get_submodule(layer.module)})
    if not inputs:
        raise ClassifierError(f"The classifier did not call its module {layer.module!r} for these images. {NAMED}")
    return _vectors(inputs[-1][1], len(images), layer.module)


def _inputs(model: PurifiedClassifier, images: Tensor, chosen: Mapping[str, nn.Module]) -> list[tuple[str, Any]]:
    """Names and first inputs of the calls of some modules while the classifier runs on images, in order."""
    inputs: list[tuple[str, Any]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [*args, *named.values()]
            inputs.append((name, given[0] if given else None))

        return hook

    with torch.no_grad(), evaluating(model.classifier), _hooked(chosen, keep):
        model.undefended(images)
    return inputs


@contextlib.contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [part.register_forward_pre_hook(hook(name), with_kwargs=True) for name, part in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vectors(found: Any, count: int, name: str) -> Tensor:
    """[B, d] from what came into a module. Raises ``ClassifierError`` where that is something else."""
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim in (2, 4) and len(found) == count:
        wide = found.detach().to(torch.promote_types(found.dtype, torch.float32))
        return (wide.mean(dim=(2, 3)) if wide.ndim == 4 else wide).cpu()
    came = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise ClassifierError(f"The input of {name!r} must be [{count}, d] or [{count}, d, H, W], but is {came}. {NAMED}")
