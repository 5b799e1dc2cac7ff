"""Folders of image files, with one folder per class or without labels, read image by image on selection."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Self

from cmap_defense.common.inputs import resize_images
from cmap_defense.data.files import read_image
from cmap_defense.data.images import LabelledImages, positions_of
from cmap_defense.errors import DataError

_SPLITS = {"train": ("train",), "test": ("test", "val")}

_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of image files, in any case; those of ``torchvision.datasets.ImageFolder``."""

_SYSTEM = (
    "__macosx",
    "__pycache__",
    "thumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "@eadir",
    "#recycle",
    "#snapshot",
)
"""What operating systems and file servers put beside people's files, in lower case."""


@dataclasses.dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files with labels; nothing is read before it is selected.

    Attributes:
        paths: of the N files.
        labels: int64 [N].
        class_names: one per class, None where there are no labels.
        size: images are resized so that their shorter side has this many pixels (bicubic, antialiased), and their
            centre of size x size is taken; None: as they are, all of one size.
        channels: 3 for RGB, 1 for grey; None: 3, unless an evaluation takes them, which reads them in the channels of
            its backbone.
        labels_known: False where there are no labels, and all are 0.

    Raises:
        DataError: size is no positive integer, or channels is neither 1 nor 3.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...] | None
    size: int | None = None
    channels: int | None = None
    labels_known: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise DataError(f"size must be a positive integer, but is {self.size!r}.")
        if self.channels not in (None, 1, 3):
            raise DataError(f"channels must be 1 or 3, but is {self.channels!r}.")

    @classmethod
    def of(
        cls, folder: str | os.PathLike[str], split: str, *, size: int | None = None, channels: int | None = None
    ) -> Self:
        """The files of a folder with one folder per class, in the order of ``torchvision.datasets.ImageFolder``.

        Args:
            folder: of class folders, or of a folder train, test or val of class folders. One that has images and no
                class folders gives images without labels.
            split: "train" or "test". Where the folder has one for this split, that is taken; val is one for "test"
                where there is no test. Where it has none for any split, the folder itself is taken.
            size: of the images, in pixels; needed where the files differ in size.
            channels: of the images, 3 for RGB or 1 for grey; None for 3, or for the backbone's in an evaluation.

        Classes are numbered in alphabetical order; files come class by class, in alphabetical order. Hidden files and
        folders, whose names start with a dot, and those of operating systems (``__MACOSX``, ``Thumbs.db``) are left
        out.

        Raises:
            DataError: no images, images beside class folders, a class folder without images, no folder for this split,
                or a wrong size or channels.
        """
        taken = Path(folder)
        try:
            taken = _of_split(taken, split)
            classes = {entry.name: image_files(entry) for entry in _folders(taken)}
            flat = sorted(path for path in taken.iterdir() if _is_image(path.name) and path.is_file())
        except OSError as error:
            raise DataError(f"{taken} cannot be read as a folder of class folders: {error}") from error
        if flat and any(classes.values()):
            raise DataError(
                f"{taken} has class folders and {len(flat)} image{'s' if len(flat) > 1 else ''} beside them, such as "
                f"{flat[0].name}: put each into a class folder, or elsewhere."
            )
        if flat:
            return cls(
                tuple(flat),
                torch.zeros(len(flat), dtype=torch.int64, device="cpu"),
                None,
                size,
                channels,
                labels_known=False,
            )
        if not classes:
            raise DataError(
                f"{taken} has neither images nor class folders: put the images into one folder per class, such as "
                f"{taken / 'cat' / '1.png'}. Files that end in {', '.join(_ENDINGS)} are images."
            )
        empty = [name for name, files in classes.items() if not files]
        if empty:
            raise DataError(
                f"{taken} has class folders without images: {', '.join(empty[:3])}. Remove them, or put files there "
                f"that end in {', '.join(_ENDINGS)}."
            )
        paths = tuple(path for files in classes.values() for path in files)
        labels = [label for label, files in enumerate(classes.values()) for _ in files]
        return cls(paths, torch.tensor(labels, dtype=torch.int64, device="cpu"), tuple(classes), size, channels)

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
        _, height, width = read_image(self.paths[0], self._channels).shape
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
        images = torch.empty(len(chosen), self._channels, *self.image_size, dtype=torch.uint8, device="cpu")
        for row, position in enumerate(chosen.tolist()):
            images[row] = (self._read(self.paths[position]) * 255).round().to(torch.uint8)
        return LabelledImages(images, self.labels[chosen], self.class_names, self.labels_known)

    @property
    def _channels(self) -> int:
        return 3 if self.channels is None else self.channels

    def _read(self, path: Path) -> Tensor:
        """[C, H, W] in [0, 1], of ``image_size``."""
        image = read_image(path, self._channels)
        if self.size is not None:
            return _centre(image, self.size)
        height, width = image.shape[1:]
        if (height, width) != self.image_size:
            raise DataError(
                f"{self.paths[0]} is {self.image_size[0]} x {self.image_size[1]} (height x width), but {path} is "
                f"{height} x {width}: give size, the pixels to which all are resized and cropped."
            )
        return image


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and in folders below it, folder by folder, both in alphabetical order, or the
    ``OSError`` of a folder that cannot be read."""

    def unreadable(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:
            raise DataError(f"{root} is a link to {place}, whose images are there already: remove the link.")
        seen.add(place)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found.append((root, sorted(filter(_is_image, files))))
    return [Path(root, name) for root, names in sorted(found) for name in names]


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is an operating system's own."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_image(name: str) -> bool:
    """Whether this is the name of an image file that is not hidden."""
    return name.lower().endswith(_ENDINGS) and not _is_hidden(name)


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, in alphabetical order, that are not hidden."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _of_split(folder: Path, split: str) -> Path:
    """The folder below ``folder`` that holds this split, or itself where it holds none.

    One that is called train, test or val holds a split where it has folders; where it has none it is a class, unless
    the folder has no others.
    """
    names = {entry.name for entry in _folders(folder)}
    alone = names <= {name for known in _SPLITS.values() for name in known}
    there = [n for known in _SPLITS.values() for n in known if n in names and (alone or _folders(folder / n))]
    for name in _SPLITS[split]:
        if name in there:
            return folder / name
    if there:
        raise DataError(
            f"{folder} has folders for {' and '.join(there)}, but none for {split}: "
            f"make a folder {' or '.join(_SPLITS[split])} in it, or choose another split."
        )
    return folder


def _centre(image: Tensor, size: int) -> Tensor:
    """The centre [C, size, size] of an image [C, H, W] in [0, 1], its shorter side resized to ``size``."""
    height, width = image.shape[1:]
    short = min(height, width)
    resized = resize_images(image[None], (size * height // short, size * width // short), "bicubic")[0]
    top, left = (round((side - size) / 2) for side in resized.shape[1:])
    return resized[:, top : top + size, left : left + size]
