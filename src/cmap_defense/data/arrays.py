"""Arrays of numpy as labelled images, and .npz files of them."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cmap_defense.data.images import LabelledImages
from cmap_defense.errors import DataError


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays ``images`` and, where it is there, ``labels`` of an .npz file."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from error
    if "images" not in arrays:
        raise DataError(f"{path} has no array named images.")
    return arrays


def npz_images(path: Path) -> LabelledImages:
    """The images of an .npz file, uint8 [N, H, W, C] or [N, H, W]; without labels, all labels are 0."""
    arrays = read_npz(path)
    images = arrays["images"]
    if images.ndim < 3:
        raise DataError(f"{path}: images must be [N, H, W, C] or [N, H, W], but are {list(images.shape)}.")
    if images.ndim == 3:
        images = images[..., None]
    known = "labels" in arrays
    data = labelled(images, arrays["labels"] if known else np.zeros(len(images), dtype=np.int64), str(path))
    return dataclasses.replace(data, labels_known=known)


def labelled(
    images: np.ndarray, labels: np.ndarray, where: str, class_names: tuple[str, ...] | None = None
) -> LabelledImages:
    """Copies of images and labels as a data set."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] > 4:
        raise DataError(
            f"{where}: images must be uint8 [N, H, W, C], but are {images.dtype} {list(images.shape)}."
            + _way_to_bytes(images)
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels must be integers [{len(images)}], not {labels.dtype} {list(labels.shape)}.")
    classes = torch.tensor(labels.astype(np.int64))
    if class_names is None and len(classes) and classes.min() < 0:
        raise DataError(
            f"{where}: labels must be integers from 0, but there is {classes.min()}. Leave out images without a class."
        )
    if class_names is not None and len(classes) and not 0 <= classes.min() <= classes.max() < len(class_names):
        raise DataError(
            f"{where}: labels must lie in 0 to {len(class_names) - 1}, but lie in {classes.min()} to {classes.max()}."
        )
    return LabelledImages(torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), classes, class_names)


def _way_to_bytes(images: np.ndarray) -> str:
    """A sentence with the line that makes uint8 [N, H, W, C] of images; empty where none is known."""
    if images.ndim != 4:
        return ""
    first = images.shape[1] <= 4 < images.shape[3]
    moved = "images.transpose(0, 2, 3, 1)" if first else "images"
    if images.dtype == np.uint8 and first:
        return f" Convert them: {moved}."
    if np.issubdtype(images.dtype, np.floating) and images.size and images.min() >= 0 and images.max() <= 1:
        return f" Convert them: ({moved} * 255).round().astype('uint8')."
    return ""
