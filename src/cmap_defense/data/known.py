"""The data sets that have a name: the places where they are looked for, and the names of their classes."""

from __future__ import annotations

import contextlib
import gzip
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock

from cmap_defense.common.paths import expanded, home
from cmap_defense.data.images import LabelledImages, labelled, read_npz
from cmap_defense.embedded import CLASS_NAMES
from cmap_defense.errors import DataError, SettingsError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FASHION_FILES = {"train": "train", "test": "t10k"}
_SYSTEM_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)  # where Debian's dataset-fashion-mnist puts it


def fashion_mnist(split: str) -> LabelledImages:
    """Fashion-MNIST: 60000 images for "train", 10000 for "test", 1 x 28 x 28, in their published order.

    Looked for in ``$CMAP_DEFENSE_DATA/fashion-mnist``, where Debian's package dataset-fashion-mnist puts it, and in
    torchvision's layout in ``~/.cache/cmap-defense``, to which torchvision downloads it when it is nowhere.

    Raises:
        DataError: a file is damaged, or the download failed.
        SettingsError: it is in neither of the first two, and the account has no home folder.
    """
    folder, stem = _fashion_folder(), _FASHION_FILES[split]
    images = _idx(folder, f"{stem}-images-idx3-ubyte", axes=3)
    labels = _idx(folder, f"{stem}-labels-idx1-ubyte", axes=1)
    return labelled(images[..., None], labels, str(folder), CLASS_NAMES)


def cifar10(split: str) -> LabelledImages:
    """CIFAR-10: 50000 images for "train", 10000 for "test", 3 x 32 x 32, in their published order.

    Looked for in ``$CMAP_DEFENSE_DATA`` and its folder cifar10, then in ``~/.cache/cmap-data``, its folder cifar10 and
    ``~/.cache/cmap-defense``: as ``cifar10_train.npz`` and ``cifar10_test.npz`` (images uint8 [N, 32, 32, 3], labels
    integers [N]), or as torchvision's folder cifar-10-batches-py. When it is nowhere, torchvision downloads it to
    ``~/.cache/cmap-defense``.

    Raises:
        DataError: a file is damaged or holds something else, or the download failed.
        SettingsError: it is not in ``$CMAP_DEFENSE_DATA``, and the account has no home folder.
    """
    found = _cifar10_in(_named_folders("cifar10"), split)
    if found is None:
        found = _cifar10_in(_account_folders(), split)
    if found is not None:
        return found
    with _downloading(
        "CIFAR-10",
        "Put cifar10_train.npz and cifar10_test.npz (images uint8 [N, 32, 32, 3], labels integers [N]), or "
        "torchvision's folder cifar-10-batches-py, into a folder and name it in the environment variable "
        "CMAP_DEFENSE_DATA.",
    ):
        return _cifar10_batches(_cache(), split, download=True)


KNOWN: Mapping[str, Callable[[str], LabelledImages]] = {"cifar10": cifar10, "fashion-mnist": fashion_mnist}
"""Reader of every data set that has a name; it takes the split."""


def _named_folders(name: str) -> list[Path]:
    """The folder that the environment names, and that of the data set in it; none where it names none."""
    given = os.environ.get("CMAP_DEFENSE_DATA")
    return [expanded(given), expanded(given) / name] if given else []


def _account_folders() -> list[Path]:
    """Folders of the account that may hold CIFAR-10."""
    cache = _cache()
    with contextlib.suppress(SettingsError):
        fetched = home("CMAP_DEFENSE_DATA") / ".cache" / "cmap-data"
        return [fetched, fetched / "cifar10", cache]
    return [cache]


def _cache() -> Path:
    """Where torchvision downloads to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home("CMAP_DEFENSE_DATA") / ".cache", "cmap-defense")


@contextlib.contextmanager
def _downloading(name: str, remedy: str) -> Iterator[None]:
    """One process downloads; others of the same job wait, and then find what is there."""
    try:
        _cache().mkdir(parents=True, exist_ok=True)
        with FileLock(_cache() / ".lock"):
            yield
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} is not here and cannot be downloaded ({error}). {remedy}") from error


def _fashion_folder() -> Path:
    def there(folder: Path) -> bool:
        return any((folder / f"t10k-labels-idx1-ubyte{suffix}").is_file() for suffix in ("", ".gz"))

    for folder in (*_named_folders("fashion-mnist")[1:], *_SYSTEM_FOLDERS):
        if there(folder):
            return folder
    downloaded = _cache() / "FashionMNIST" / "raw"
    if not there(downloaded):
        from torchvision.datasets import FashionMNIST

        with _downloading(
            "Fashion-MNIST",
            "Install Debian's package dataset-fashion-mnist, or put its four files into a folder fashion-mnist and "
            "name the folder above it in the environment variable CMAP_DEFENSE_DATA.",
        ):
            FashionMNIST(str(_cache()), download=True)
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


def _cifar10_in(folders: list[Path], split: str) -> LabelledImages | None:
    """The split from the first of these folders that holds it, an .npz file before torchvision's layout."""
    for folder in folders:
        path = folder / f"cifar10_{split}.npz"
        if path.is_file():
            return _cifar10_npz(path)
    for folder in folders:
        batches = folder / "cifar-10-batches-py"
        if batches.is_dir():
            try:
                return _cifar10_batches(folder, split, download=False)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{batches} cannot be read, or a file in it is missing or is not the published one. "
                    "Delete the folder, and CIFAR-10 is looked for elsewhere, or downloaded."
                ) from error
    return None


def _cifar10_npz(path: Path) -> LabelledImages:
    arrays = read_npz(path)
    if "labels" not in arrays:
        raise DataError(f"{path} has no array named labels.")
    if arrays["images"].shape[1:] != (32, 32, 3):
        raise DataError(f"{path}: images must be [N, 32, 32, 3], but are {list(arrays['images'].shape)}.")
    return labelled(arrays["images"], arrays["labels"], str(path), CIFAR10_CLASSES)


def _cifar10_batches(folder: Path, split: str, *, download: bool) -> LabelledImages:
    """From torchvision's layout below ``folder``; its checksums are compared before anything is unpickled."""
    from torchvision.datasets import CIFAR10

    with warnings.catch_warnings():  # numpy 2.4.0 objects to how the published pickles were written
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        data = CIFAR10(str(folder), train=split == "train", download=download)
    return labelled(np.asarray(data.data), np.asarray(data.targets), str(folder), CIFAR10_CLASSES)
