"""Images as people have them, to float tensors [B, C, H, W] in [0, 1]: PIL images, numpy arrays, 8-bit tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmap_defense.common.inputs import conversion_line
from cmap_defense.errors import InputTypeError, InputValueError


def to_batch(images: object, channels: int) -> tuple[object, bool]:
    """Images in the form that the rest of the package takes, and whether they had to be in [0, 1] before.

    Args:
        images: a tensor [B, C, H, W] or [C, H, W], floating-point or uint8; a numpy array [B, H, W, C], [H, W, C] or,
            for one channel, [H, W], likewise; a PIL image, which becomes grey or RGB; or a sequence of single ones,
            all of one size. What is none of these comes back as it is.
        channels: C of the backbone's images.

    Returns:
        The batch: a float tensor, on the tensor's device or the CPU. True for PIL images and uint8, which are in [0, 1]
        whatever the caller's units are.

    Raises:
        InputTypeError: a path, or an array of another dtype, or a PIL image of a mode whose range is not known.
        InputValueError: an array has other axes, the images of a sequence have several sizes, or there are none.
    """
    if isinstance(images, (str, os.PathLike)):
        raise InputTypeError(
            f"Images must be a tensor, an array, a PIL image or a list of them, but {os.fspath(images)!r} is a path. "
            "Open it: PIL.Image.open(path). `cmap-defense purify` takes paths."
        )
    if isinstance(images, (list, tuple)):
        return _stacked(images, channels)
    if isinstance(images, Image.Image):
        return _of_pil(images, channels), True
    if isinstance(images, np.ndarray):
        return _of_array(images, channels), images.dtype == np.uint8
    if isinstance(images, Tensor):
        eight_bit = images.dtype == torch.uint8
        unit = images.float() / 255 if eight_bit else images
        return unit[None] if unit.ndim == 3 else unit, eight_bit
    return images, False


def _stacked(images: Sequence[object], channels: int) -> tuple[Tensor, bool]:
    parts = [to_batch(image, channels) for image in images]
    tensors = [part for part, _ in parts if isinstance(part, Tensor) and part.ndim == 4 and len(part) == 1]
    if not parts or len(tensors) != len(parts):
        kinds = ", ".join(sorted({type(image).__name__ for image in images})) or "nothing"
        raise InputTypeError(f"A list of images must hold single PIL images, arrays or tensors, but holds {kinds}.")
    sizes = sorted({tuple(part.shape[1:]) for part in tensors})
    if len(sizes) > 1:
        raise InputValueError(
            f"Images of a list must be of one size, but are {', '.join(map(str, sizes))}. "
            "Purify them one by one, or resize them to one size first."
        )
    if len({eight_bit for _, eight_bit in parts}) > 1:
        raise InputValueError(
            "Images of a list must be of one kind, but some are 8-bit images and others floating-point. "
            "Purify them one by one, or convert all of them to floating-point in [0, 1]."
        )
    return torch.cat(tensors), parts[0][1]


def _of_pil(image: Image.Image, channels: int) -> Tensor:
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise InputValueError(f"PIL images have 1 or 3 channels, but the backbone makes images with {channels}.")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InputTypeError(
            f"The range of a PIL image of mode {image.mode!r} is not known. Convert it to an array in [0, 1] first, "
            "such as numpy.asarray(image) / 65535 for 16-bit grey."
        )
    try:
        array = np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError) as error:
        name = getattr(image, "filename", "") or "An image"
        raise InputValueError(f"{name} cannot be read: {error}.") from error
    return _of_array(array, channels)


def _of_array(array: np.ndarray, channels: int) -> Tensor:
    given = array
    if array.ndim == 2 and channels == 1:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise InputTypeError(f"Arrays must be uint8, or floating-point in [0, 1], but are {array.dtype}.")
    if array.ndim != 4 or array.shape[3] != channels:
        raise InputValueError(
            f"Arrays must be [B, H, W, {channels}] or [H, W, {channels}], but are {list(given.shape)}."
            + conversion_line(given, channels)
        )
    tensor = torch.from_numpy(np.array(array, dtype=np.float32)).permute(0, 3, 1, 2)
    return (tensor / 255 if array.dtype == np.uint8 else tensor).contiguous()
