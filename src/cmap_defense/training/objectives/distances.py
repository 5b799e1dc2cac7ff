"""Distances between images, for losses: one number per image.

Norms are sums over all elements, not means, as in the papers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmap_defense.backbones.weights import sha256_of
from cmap_defense.common.modules import building, device_of, dtype_of
from cmap_defense.common.optional import optional_import
from cmap_defense.common.paths import hub_folder
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import BackboneFileError, InputValueError, SettingsError, UnknownNameError

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images [B, C, H, W] in [-1, 1] to distances [B], float32 or wider."""

LPIPS_SIZE = 224
"""Height and width that small images are enlarged to."""

LPIPS_LARGE = 256
"""Images whose sides have so many pixels are compared at their own size."""


def _difference(a: Tensor, b: Tensor) -> Tensor:
    difference = (a - b).flatten(1)
    return difference.to(torch.promote_types(difference.dtype, torch.float32))


def squared_l2(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_2^2 over all but the first axis, [B]; arXiv 2303.01469, section 3."""
    return _difference(a, b).square().sum(dim=1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_1 over all but the first axis, [B]; arXiv 2303.01469, section 3."""
    return _difference(a, b).abs().sum(dim=1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c over all but the first axis, [B]; arXiv 2310.14189, eq. 8.

    Args:
        a: images [B, C, H, W].
        b: images [B, C, H, W].
        c: above 0; None for 0.00054 sqrt(C H W) (section 3.3).
    """
    corner = 0.00054 * a[0].numel() ** 0.5 if c is None else c
    square = squared_l2(a, b)
    return square / ((square + corner**2).sqrt() + corner)  # the same without cancellation


def distance_named(name: str, *, huber: float | None = None, lpips: Distance | None = None) -> Distance:
    """A distance by its name in settings.

    Args:
        name: "l2" (squared), "l1", "pseudo-huber" or "lpips".
        huber: c of ``pseudo_huber``.
        lpips: the distance "lpips"; None for ``LPIPS`` with the published network.

    Raises:
        UnknownNameError: another name.
        MissingExtraError, BackboneFileError: ``LPIPS`` cannot be made.
    """
    if lpips is not None and not callable(lpips):
        raise SettingsError(f"The distance lpips must be a function of two batches of images, but is {lpips!r}.")
    if name == "lpips":
        return LPIPS() if lpips is None else lpips
    huber_distance = functools.partial(pseudo_huber, c=huber)
    known: dict[str, Distance] = {"l2": squared_l2, "l1": l1, "pseudo-huber": huber_distance}
    if name not in known:
        raise UnknownNameError(f"There is no distance {name!r}.{near_matches(name, [*known, 'lpips'])}")
    return known[name]


class LPIPS:
    """The learned perceptual distance of Zhang et al. 2018 (arXiv 1801.03924, eq. 1).

    Called with two batches [B, C, H, W] in [-1, 1], C being 1 or 3, it gives distances [B] in float32 or wider:

        d(a, b) = sum_l 1/(H_l W_l) sum_hw || w_l * (y_hw^l(a) - y_hw^l(b)) ||^2

    with y^l the activations of layer l, normalised along their channels. Images are prepared as for the published
    consistency models: those below 256 pixels are enlarged bilinearly to 224 x 224. Grey images are repeated to three
    channels. The VGG network has max pooling, as in Zhang et al.; the code of the consistency models has average
    pooling.

    Args:
        network: two batches [B, 3, H, W] in [-1, 1] to distances, B numbers of any shape. It is put into eval mode,
            its weights need no gradient, and it is moved to the device of the images. None:
            ``published_lpips``.

    Raises:
        MissingExtraError, BackboneFileError: as ``published_lpips`` does.
        InputValueError: when called with images of neither 1 nor 3 channels.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network = (published_lpips() if network is None else network).eval().requires_grad_(False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        if device_of(self.network) not in (None, a.device):
            self.network.to(a.device)
        inner = dtype_of(self.network) or wide
        with torch.autocast(a.device.type, enabled=False):
            distances = self.network(*(_prepared(images.to(inner)) for images in (a, b)))
        return distances.reshape(len(a)).to(wide)


def published_lpips() -> nn.Module:
    """LPIPS of version 0.1 on VGG16, from the lpips package, the extra ``[train]``.

    The package brings the layers' weights. Those of VGG16 are torchvision's and are read from its cache; nothing is
    downloaded.

    Raises:
        MissingExtraError: the lpips package is not installed.
        BackboneFileError: VGG16's file is not in the cache, or is not whole.
    """
    lpips = optional_import("lpips", "train", "The distance LPIPS")
    _require_trunk()
    with building(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision and torch by arguments of former versions
        network: Any = lpips.LPIPS(net="vgg", verbose=False)
    return network


def _require_trunk() -> None:
    """Raise BackboneFileError unless VGG16's file is where torchvision looks, so that it has nothing to download."""
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    path = hub_folder() / "checkpoints" / url.rsplit("/", 1)[1]
    fix = f"Put {url} (528 MB) there; TORCH_HOME moves the folder."
    if not path.is_file():
        raise BackboneFileError(f"LPIPS needs the weights of VGG16 at {path}, where there is no file. {fix}")
    digest, start = sha256_of(path), path.stem.rsplit("-", 1)[1]
    if not digest.startswith(start):
        raise BackboneFileError(
            f"{path} is not whole: its SHA-256 starts with {digest[: len(start)]} and should with {start}. {fix}"
        )


def _prepared(images: Tensor) -> Tensor:
    """[B, 3, H', W'] of [B, C, H, W]: grey repeated, small images enlarged."""
    channels, *size = images.shape[1:]
    if channels not in (1, 3):
        raise InputValueError(f"LPIPS compares images of 1 or 3 channels, but these are {list(images.shape)}.")
    images = images.expand(-1, 3, -1, -1)
    if min(size) >= LPIPS_LARGE:
        return images
    return F.interpolate(images, size=(LPIPS_SIZE, LPIPS_SIZE), mode="bilinear")
