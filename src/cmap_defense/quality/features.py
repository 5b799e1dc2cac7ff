"""Features of a classifier: the input of its last linear layer."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.backbones.weights import sha256_of
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import building, evaluating
from cmap_defense.common.optional import optional_import
from cmap_defense.common.paths import hub_folder
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import ClassifierError, DataError, InputValueError, MissingExtraError, SettingsError

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


INCEPTION_NUMBERS = 2048
"""Length of the feature vectors that FID is made of."""

FILE = "weights-inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def inception_file() -> Path:
    """The file of the network's weights, compared with its checksum.

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        DataError: the file is not there, or is another one.
    """
    _library()
    path, shown = _place()
    if not path.is_file():
        raise DataError(
            "The weights of torch-fidelity's Inception network are not there, and nothing is fetched. Put "
            f"{ADDRESS} at {shown}."
        )
    if sha256_of(path) != SHA256:
        raise DataError(f"{shown} is damaged or another file: its SHA-256 is not {SHA256}. Put {ADDRESS} in its place.")
    return path


def inception_features(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    """FID's features of images, and the library that they are from, with its version.

    Args:
        path: from ``inception_file``.
        device: where the network works.

    Returns:
        A function from images [B, C, H, W] in [0, 1], C being 1 or 3, to features [B, 2048], float32 on the CPU. Images
        are rounded to 8 bits, grey ones shown in all three channels; the library resizes them.

    Raises:
        MissingExtraError: torch-fidelity is not installed.
    """
    library = _library()
    with building():
        made = library.FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(INCEPTION_NUMBERS)], feature_extractor_weights_path=str(path)
        )
    network = made.eval().requires_grad_(False).to(device)

    def features(images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise InputValueError(f"FID is of images with 1 or 3 channels, but these have {images.shape[1]}.")
        pixels = (images.detach().clamp(0, 1) * 255).round().to(device, torch.uint8)
        with torch.no_grad():
            return network(pixels.expand(-1, 3, -1, -1))[0].float().cpu()

    return features, f"torch-fidelity {library.__version__}"


def _library() -> Any:
    with warnings.catch_warnings():  # it changes the filters
        try:
            return optional_import("torch_fidelity", "quality", "FID is computed with torch-fidelity")
        except MissingExtraError as error:
            raise MissingExtraError(
                "torch-fidelity is not installed: pip install 'cmap-defense[quality]'. The weights of its Inception "
                f"network are not fetched either: put {ADDRESS} at {_place()[1]}."
            ) from error


def _place() -> tuple[Path, str]:
    """Where the library looks for the weights, below $TORCH_HOME; the same for people, who may pass it on."""
    path = hub_folder() / "checkpoints" / FILE
    return path, str(path).replace(os.path.expanduser("~"), "~", 1)
