"""Image files in and out; nothing half-written is ever left behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cmap_defense.common.files import written_whole
from cmap_defense.errors import DataError
from cmap_defense.plots.purification import as_picture


def read_image(path: str | os.PathLike[str], channels: int) -> Tensor:
    """An image file as float32 [C, H, W] in [0, 1], turned as its EXIF says; grey (1 channel) or RGB (3 channels).

    Raises:
        DataError: the file is missing, damaged or no image.
    """
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise DataError(f"Image files have 1 or 3 channels, but the backbone makes images with {channels}.")
    try:
        with Image.open(path) as image:
            pixels = _pixels(ImageOps.exif_transpose(image), mode)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{os.fspath(path)} cannot be read as an image: {error}") from error
    pixels = pixels[..., None] if channels == 1 else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pixels(image: Image.Image, mode: str) -> np.ndarray:
    """The pixels as float32 in [0, 1], [H, W] or [H, W, 3]; 16-bit grey keeps its range, which Pillow would clip."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.float32) / 65535
        return grey if mode == "L" else np.stack([grey] * 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode!r} pixels have no known range")
    return np.asarray(image.convert(mode), dtype=np.float32) / 255


def write_image(image: Tensor | Image.Image, path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    picture = as_picture(image) if isinstance(image, Tensor) else image
    written_whole(path, lambda partial: picture.save(partial, format="PNG"))
    return path
