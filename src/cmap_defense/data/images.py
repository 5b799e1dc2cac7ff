"""Labelled images, in memory or read when they are selected."""

from __future__ import annotations

import dataclasses
import numbers
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cmap_defense.errors import DataError


@runtime_checkable
class ImageSource(Protocol):
    """N labelled images in a fixed order, which may lie on disk until they are selected.

    ``LabelledImages`` is one whose images are all in memory.
    """

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class, where they are known."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def select(self, indices: Sequence[int] | Tensor) -> LabelledImages:
        """The images at these positions, in this order, in memory.

        Args:
            indices: integers from 0 to N - 1, or an int64 tensor [M] of them; none, or one several times, is fine.

        Raises:
            DataError: an index is no integer or out of range, or an image cannot be read.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledImages:
    """Labelled images in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        class_names: one per class, where they are known.
        labels_known: False where there are no labels, and all are 0.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    labels_known: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> LabelledImages:
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def select(self, indices: Sequence[int] | Tensor) -> LabelledImages:
        """A copy of the images at these positions, in this order, with the same class names.

        Args:
            indices: integers from 0 to N - 1, or an int64 tensor [M] of them; none, or one several times, is fine.

        Raises:
            DataError: an index is no integer or out of range.
        """
        chosen = positions_of(indices, len(self))
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])

    @property
    def unit(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.float() / 255


def positions_of(indices: Sequence[int] | Tensor, total: int) -> Tensor:
    """Indices into ``total`` images as int64 [M] on the CPU, or a ``DataError``."""
    if isinstance(indices, Tensor) and (indices.dtype != torch.int64 or indices.ndim != 1):
        raise DataError(f"Indices must be int64 [M], but are {indices.dtype} {list(indices.shape)}.")
    try:
        listed = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    except TypeError as error:
        raise DataError(f"Indices must be a sequence of integers, but are {indices!r}.") from error
    for index in listed:
        if isinstance(index, bool) or not isinstance(index, numbers.Integral):
            raise DataError(f"Indices must be integers, but there is {index!r} ({type(index).__name__}).")
        if not 0 <= int(index) < total:
            known = f"they go from 0 to {total - 1}" if total else "there are none"
            raise DataError(f"There is no image {index}: {known}.")
    return torch.tensor([int(index) for index in listed], dtype=torch.int64, device="cpu")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays ``images`` and, where it is there, ``labels`` of an .npz file."""
    try:
        with path.open("rb") as stream:
            start = stream.read(6)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if start == b"\x93NUMPY":
        raise DataError(f"{path} is a single array: write it as an .npz file, np.savez(path, images=array).")
    if not start.startswith(b"PK"):
        raise DataError(
            f"{path} is no .npz file. Data are a name, an .npz file with an array named images, or a folder of images."
        )
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
    classes = torch.tensor(labels.astype(np.int64), device="cpu")
    if class_names is None and len(classes) and classes.min() < 0:
        raise DataError(
            f"{where}: labels must be integers from 0, but there is {classes.min()}. Leave out images without a class."
        )
    if class_names is not None and len(classes) and not 0 <= classes.min() <= classes.max() < len(class_names):
        raise DataError(
            f"{where}: labels must lie in 0 to {len(class_names) - 1}, but lie in {classes.min()} to {classes.max()}."
        )
    return LabelledImages(torch.tensor(images.transpose(0, 3, 1, 2), device="cpu").contiguous(), classes, class_names)


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
