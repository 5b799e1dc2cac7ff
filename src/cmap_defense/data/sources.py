"""Data sets by name, file or folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cmap_defense.common.paths import expanded
from cmap_defense.common.settings import near_matches
from cmap_defense.data.folders import FolderImages
from cmap_defense.data.images import ImageSource, LabelledImages, npz_images
from cmap_defense.data.known import KNOWN
from cmap_defense.errors import DataError, UnknownNameError

DATASETS = tuple(KNOWN)
"""Names that ``open_dataset`` and ``load_dataset`` know."""


def open_dataset(
    source: str | os.PathLike[str], split: str = "train", *, size: int | None = None, channels: int | None = None
) -> ImageSource:
    """A data set in the order of its publication; the images of a folder are read when they are selected.

    Args:
        source: "cifar10" or "fashion-mnist", see ``cifar10`` and
            ``fashion_mnist`` for where they are looked for; an .npz file with ``images``
            (uint8 [N, H, W, C] or [N, H, W]) and, where there are some, ``labels`` (integers [N]); or a folder with one
            folder of image files per class, of image files without labels, or with such a folder per split, see
            ``of``.
        split: "train" or "test"; an .npz file has one split and takes no notice of it.
        size: height and width of the images in pixels. Those of a folder are resized and cropped to it, and need it
            where they differ in size; others must have it.
        channels: 3 for RGB, 1 for grey. Images of a folder are read so; None reads them with 3, and an evaluation with
            as many as its backbone has. Others must have as many.

    Raises:
        UnknownNameError: neither a known name nor a file nor a folder.
        DataError: the data set is damaged or holds something else, has another size or other channels, or the download
            failed.
    """
    return open_named(source, split, size, channels, DATASETS)


def open_named(
    source: str | os.PathLike[str], split: str, size: int | None, channels: int | None, names: Sequence[str]
) -> ImageSource:
    """The same for a caller who takes ``names``, those of which a mistyped one is compared with."""
    if split not in ("train", "test"):
        raise DataError(f'split must be "train" or "test", but is {split!r}.')
    text = os.fspath(source)
    path = Path(text) if text in KNOWN else expanded(text)
    if text in KNOWN:
        data = KNOWN[text](split)
    elif path.is_dir():
        return FolderImages.of(path, split, size=size, channels=channels)
    elif path.suffix == ".npz" or path.is_file():
        data = npz_images(path)
    else:
        raise UnknownNameError(
            f"There is no data set {text!r}.{near_matches(text, names)} "
            "An .npz file or a folder of class folders may be given too."
        )
    _, found, height, width = data.images.shape
    if size is not None and (height, width) != (size, size):
        raise DataError(
            f"{text}: images are {height} x {width}, not {size} x {size}: only images of a folder are resized."
        )
    if channels is not None and found != channels:
        raise DataError(f"{text}: images have {found} channels, not {channels}: only images of a folder are changed.")
    return data


def load_dataset(
    source: str | os.PathLike[str], split: str = "train", *, size: int | None = None, channels: int | None = None
) -> LabelledImages:
    """What ``open_dataset`` opens, with all images in memory.

    Args:
        source: as for ``open_dataset``.
        split: as for ``open_dataset``.
        size: as for ``open_dataset``.
        channels: as for ``open_dataset``.

    Raises:
        UnknownNameError: neither a known name nor a file nor a folder.
        DataError: as of ``open_dataset``, or an image of a folder cannot be read or differs in size.
    """
    opened = open_dataset(source, split, size=size, channels=channels)
    return opened if isinstance(opened, LabelledImages) else opened.select(range(len(opened)))
