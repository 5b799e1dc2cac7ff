"""Data sets by name or file, as 8-bit images in memory."""

from __future__ import annotations

import dataclasses
import gzip
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmap_defense.errors import DataError, UnknownNameError
from cmap_defense.settings import near_matches

__all__ = ["DATASETS", "LabelledImages", "load_dataset"]

DATASETS = ("fashion-mnist",)
"""Names that :func:`load_dataset` knows."""

_FASHION_FILES = {"train": "train", "test": "t10k"}
_SYSTEM_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)  # where Debian's dataset-fashion-mnist puts it


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """images: uint8 [N, C, H, W]. labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> LabelledImages:
        return LabelledImages(self.images[index], self.labels[index])

    @property
    def unit(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.float() / 255


def load_dataset(source: str | os.PathLike[str], split: str = "train") -> LabelledImages:
    """A data set in the order of its publication.

    Args:
        source: "fashion-mnist", or an .npz file with ``images`` (uint8 [N, H, W, C] or [N, H, W]) and, where there are
            some, ``labels`` (integers [N]).
        split: "train" or "test"; an .npz file has one split and takes no notice of it.

    Fashion-MNIST is looked for in ``$CMAP_DATA/fashion-mnist``, where Debian's package dataset-fashion-mnist puts it,
    and in torchvision's layout in ``~/.cache/cmap-defense``, to which torchvision downloads it when it is nowhere.

    Raises:
        UnknownNameError: neither a known name nor a file.
        DataError: the file is damaged or holds something else, or the download failed.
    """
    if split not in _FASHION_FILES:
        raise DataError(f'split must be "train" or "test", but is {split!r}.')
    text = os.fspath(source)
    if text == "fashion-mnist":
        return _fashion_mnist(split)
    path = Path(text).expanduser()
    if path.suffix == ".npz" or path.is_file():
        return _npz(path)
    raise UnknownNameError(
        f"There is no data set {text!r}.{near_matches(text, DATASETS)} An .npz file may be given too."
    )


def _fashion_mnist(split: str) -> LabelledImages:
    folder, stem = _fashion_folder(), _FASHION_FILES[split]
    images = _idx(folder, f"{stem}-images-idx3-ubyte", axes=3)
    labels = _idx(folder, f"{stem}-labels-idx1-ubyte", axes=1)
    return _labelled(images[..., None], labels, str(folder))


def _fashion_folder() -> Path:
    candidates = [Path(os.environ["CMAP_DATA"], "fashion-mnist")] if "CMAP_DATA" in os.environ else []
    candidates += _SYSTEM_FOLDERS
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "cmap-defense")
    downloaded = cache / "FashionMNIST" / "raw"
    for folder in (*candidates, downloaded):
        if any((folder / f"t10k-labels-idx1-ubyte{suffix}").is_file() for suffix in ("", ".gz")):
            return folder
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Fashion-MNIST is not here and cannot be downloaded ({error}). "
            "Install Debian's package dataset-fashion-mnist, or put its four files into a folder fashion-mnist and "
            "name the folder above it in the environment variable CMAP_DATA."
        ) from error
    return downloaded


def _idx(folder: Path, name: str, *, axes: int) -> np.ndarray:
    """An array in the idx format of MNIST: a magic number, the sizes (big-endian), the bytes."""
    try:
        path = folder / name
        content = path.read_bytes() if path.is_file() else gzip.decompress((folder / f"{name}.gz").read_bytes())
        sizes = np.frombuffer(content, dtype=">i4", count=axes, offset=4)
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{folder / name} cannot be read: {error}") from error


def _npz(path: Path) -> LabelledImages:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from error
    if "images" not in arrays:
        raise DataError(f"{path} has no array named images.")
    images = arrays["images"]
    if images.ndim < 3:
        raise DataError(f"{path}: images must be [N, H, W, C] or [N, H, W], but are {list(images.shape)}.")
    if images.ndim == 3:
        images = images[..., None]
    return _labelled(images, arrays.get("labels", np.zeros(len(images), dtype=np.int64)), str(path))


def _labelled(images: np.ndarray, labels: np.ndarray, where: str) -> LabelledImages:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] > 4:
        raise DataError(f"{where}: images must be uint8 [N, H, W, C], but are {images.dtype} {list(images.shape)}.")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels must be integers [{len(images)}], not {labels.dtype} {list(labels.shape)}.")
    return LabelledImages(
        torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(labels.astype(np.int64))
    )
