"""Folders of class folders, read image by image when asked."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Self

from cmap_defense.data.files import read_image
from cmap_defense.data.images import LabelledImages, positions_of
from cmap_defense.errors import DataError
from cmap_defense.inputs import resize_images

__all__ = ["FolderImages"]

_SPLITS = {"train": ("train",), "test": ("test", "val")}


@dataclasses.dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files with labels; nothing is read before it is selected.

    paths: of the N files. labels: int64 [N]. class_names: one per class. size: images are resized so that their shorter
    side has this many pixels (bicubic, antialiased), and their centre of size x size is taken; None: as they are, all
    of one size. channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: size is no positive integer, or channels is neither 1 nor 3.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    size: int | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise DataError(f"size must be a positive integer, but is {self.size!r}.")
        if self.channels not in (1, 3):
            raise DataError(f"channels must be 1 or 3, but is {self.channels!r}.")

    @classmethod
    def of(cls, folder: str | os.PathLike[str], split: str, *, size: int | None = None, channels: int = 3) -> Self:
        """The files of a folder with one folder per class, as ``torchvision.datasets.ImageFolder`` lists them.

        Args:
            folder: of class folders, or of a folder train, test or val of class folders.
            split: "train" or "test". Where the folder has one for this split, that is taken; val is one for "test"
                where there is no test. Where it has none for any split, the folder itself is taken.
            size: of the images, in pixels; needed where the files differ in size.
            channels: of the images, 3 for RGB or 1 for grey.

        Classes are numbered in alphabetical order; files come class by class, in alphabetical order.

        Raises:
            DataError: no class folders, one without images, no folder for this split, or a wrong size or channels.
        """
        from torchvision.datasets import ImageFolder

        taken = Path(folder)
        try:
            taken = _of_split(taken, split)
            listing = ImageFolder(str(taken))
        except OSError as error:
            raise DataError(f"{taken} cannot be read as a folder of class folders: {error}") from error
        paths = tuple(Path(path) for path, _ in listing.samples)
        labels = torch.tensor(listing.targets, dtype=torch.int64)
        return cls(paths, labels, tuple(listing.classes), size, channels)

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cached_property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every image: size x size, or what the first file has.

        Raises:
            DataError: the first file cannot be read.
        """
        if self.size is not None:
            return self.size, self.size
        _, height, width = read_image(self.paths[0], self.channels).shape
        return height, width

    def select(self, indices: Sequence[int] | Tensor) -> LabelledImages:
        """The images at these positions, in this order, read now and rounded to 8 bits.

        Args:
            indices: integers from 0 to N - 1, or an int64 tensor [M] of them; none, or one several times, is fine.

        Raises:
            DataError: an index is no integer or out of range, a file cannot be read, or one has another size than the
                first and no size was given.
        """
        chosen = positions_of(indices, len(self))
        images = torch.empty(len(chosen), self.channels, *self.image_size, dtype=torch.uint8)
        for row, position in enumerate(chosen.tolist()):
            images[row] = (self._read(self.paths[position]) * 255).round().to(torch.uint8)
        return LabelledImages(images, self.labels[chosen], self.class_names)

    def _read(self, path: Path) -> Tensor:
        """[C, H, W] in [0, 1], of :attr:`image_size`."""
        image = read_image(path, self.channels)
        if self.size is not None:
            return _centre(image, self.size)
        height, width = image.shape[1:]
        if (height, width) != self.image_size:
            raise DataError(
                f"{self.paths[0]} is {self.image_size[0]} x {self.image_size[1]} (height x width), but {path} is "
                f"{height} x {width}: give size, the pixels to which all are resized and cropped."
            )
        return image


def _of_split(folder: Path, split: str) -> Path:
    """The folder below ``folder`` that holds this split, or itself where it holds none."""
    splits = [name for names in _SPLITS.values() for name in names if _has_folders(folder / name)]
    for name in _SPLITS[split]:
        if name in splits:
            return folder / name
    if splits:
        raise DataError(
            f"{folder} has class folders for {' and '.join(splits)}, but none for {split}: "
            f"make a folder {' or '.join(_SPLITS[split])} in it, or ask for another split."
        )
    return folder


def _has_folders(folder: Path) -> bool:
    """Whether there is such a folder with folders in it; a class that is called train has none."""
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def _centre(image: Tensor, size: int) -> Tensor:
    """The centre [C, size, size] of an image [C, H, W] in [0, 1], its shorter side resized to ``size``."""
    height, width = image.shape[1:]
    short = min(height, width)
    resized = resize_images(image[None], (size * height // short, size * width // short), "bicubic")[0]
    top, left = (round((side - size) / 2) for side in resized.shape[1:])
    return resized[:, top : top + size, left : left + size]
