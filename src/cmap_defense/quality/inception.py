"""FID's own features: the Inception network of torch-fidelity, where its weights are there already.

torch-fidelity keeps them where torch.hub keeps its downloads, and fetches them when they are not there. Nothing is
fetched here: without the file there is no FID, and the error says where it belongs. The file is used only when its
checksum is the known one, since the library unpickles it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones.weights import sha256_of
from cmap_defense.common.modules import building
from cmap_defense.common.optional import optional_import
from cmap_defense.common.paths import hub_folder
from cmap_defense.errors import DataError, InputValueError, MissingExtraError

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
