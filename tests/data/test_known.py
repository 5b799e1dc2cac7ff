"""Data sets by name: where they are looked for, in which order, and the error where they are not."""

import gzip
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, FashionMNIST

from cmap_defense.data import known, load_dataset
from cmap_defense.embedded import CLASS_NAMES
from cmap_defense.errors import CmapError, DataError, SettingsError

PIXELS = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
LABELS = np.array([3, 1, 9, 0], dtype=np.uint8)

Batches = Callable[[Path], Mapping[str, np.ndarray]]


def write_fashion(folder: Path, *, compress: bool = False, labels: np.ndarray = LABELS[:3]) -> np.ndarray:
    """A test split of three images in the layout of Fashion-MNIST; gives the images."""
    folder.mkdir(parents=True)
    images = np.ascontiguousarray(PIXELS[:3, :7, :6, 0])
    files = {
        "t10k-images-idx3-ubyte": np.array([2051, 3, 7, 6], dtype=">i4").tobytes() + images.tobytes(),
        "t10k-labels-idx1-ubyte": np.array([2049, 3], dtype=">i4").tobytes() + labels.tobytes(),
    }
    for name, content in files.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return images


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_is_found_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: bool
) -> None:
    images = write_fashion(tmp_path / "fashion-mnist", compress=compress)
    monkeypatch.setenv("CMAP_DEFENSE_DATA", str(tmp_path))
    data = load_dataset("fashion-mnist", "test")
    assert np.array_equal(data.images[:, 0].numpy(), images)
    assert data.labels.tolist() == [3, 1, 9]
    assert data.class_names == CLASS_NAMES


@pytest.mark.parametrize("xdg", [True, False])
def test_fashion_mnist_is_found_where_torchvision_put_it(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, xdg: bool
) -> None:
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = write_fashion((tmp_path if xdg else home / ".cache") / "cmap-defense" / "FashionMNIST" / "raw")
    assert np.array_equal(load_dataset("fashion-mnist", "test").images[:, 0].numpy(), images)


def test_fashion_mnist_is_downloaded_when_it_is_nowhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(root: str, download: bool) -> None:
        assert download
        write_fashion(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", made)
    assert load_dataset("fashion-mnist", "test").images.shape == (3, 1, 7, 6)
    assert load_dataset("fashion-mnist", "test").images.shape == (3, 1, 7, 6)  # now it is there


@pytest.mark.parametrize(("name", "cls"), [("fashion-mnist", FashionMNIST), ("cifar10", CIFAR10)])
@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("no route"), OSError("no route")])
def test_a_failed_download_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, name: str, cls: type, error: Exception
) -> None:
    def download(self: object) -> None:
        raise error

    monkeypatch.setattr(cls, "download", download)
    with pytest.raises(DataError, match=r"is not here and cannot be downloaded \(.*no route.*CMAP_DEFENSE_DATA"):
        load_dataset(name)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_of_fashion_mnist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_fashion(tmp_path / "fashion-mnist")
    path = tmp_path / "fashion-mnist" / name
    path.write_bytes(path.read_bytes()[:-2])
    monkeypatch.setenv("CMAP_DEFENSE_DATA", str(tmp_path))
    with pytest.raises(CmapError, match=name):
        load_dataset("fashion-mnist", "test")


def write_cifar10(folder: Path, split: str, first: int = 0, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"images": PIXELS[first:], "labels": LABELS[first:]} | changes
    np.savez(folder / f"cifar10_{split}.npz", **{name: array for name, array in arrays.items() if array is not None})


PLACES = ["given", "given/cifar10", "home/.cache/cmap-data", "home/.cache/cmap-data/cifar10"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a home and a folder that the environment names in it, both empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CMAP_DEFENSE_DATA", str(tmp_path / "given"))
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_cifar10_is_found_as_arrays(machine: Path, place: str) -> None:
    write_cifar10(machine / place, "train")
    write_cifar10(machine / place, "test", 2)
    data = load_dataset("cifar10")
    assert data.images.dtype == torch.uint8
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), PIXELS)
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == LABELS.tolist()
    assert data.class_names is not None
    assert [data.class_names[label] for label in data.labels] == ["cat", "automobile", "truck", "airplane"]
    assert load_dataset("cifar10", "test").labels.tolist() == [9, 0]


@pytest.mark.parametrize("first", range(4))
def test_the_first_place_counts(machine: Path, cifar10_batches: Batches, first: int) -> None:
    cifar10_batches(machine / "home" / ".cache" / "cmap-defense")
    for i, place in enumerate(PLACES[first:]):
        write_cifar10(machine / place, "test", i)
    assert len(load_dataset("cifar10", "test")) == 4


@pytest.mark.parametrize("place", ["given", "given/cifar10", "home/.cache/cmap-defense"])
def test_cifar10_is_found_in_torchvisions_layout(machine: Path, cifar10_batches: Batches, place: str) -> None:
    images = cifar10_batches(machine / place)
    for split, count in (("train", 10), ("test", 3)):
        data = load_dataset("cifar10", split)
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), images[split])
        assert data.labels.tolist() == list(range(count))
        assert data.class_names == known.CIFAR10_CLASSES


def test_cifar10_is_downloaded_when_it_is_nowhere(
    home: Path, monkeypatch: pytest.MonkeyPatch, cifar10_batches: Batches
) -> None:
    monkeypatch.setattr(CIFAR10, "download", lambda self: cifar10_batches(Path(self.root)))
    assert len(load_dataset("cifar10", "test")) == 3
    assert (home / ".cache" / "cmap-defense" / "cifar-10-batches-py").is_dir()
    assert len(load_dataset("cifar10", "train")) == 10  # writing them again would fail


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"something else")])
def test_batches_that_are_not_the_published_ones_are_named(
    machine: Path, cifar10_batches: Batches, damage: Callable[[Path], object]
) -> None:
    cifar10_batches(machine / "given")
    damage(machine / "given" / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(DataError, match=r"given/cifar-10-batches-py cannot be read, or .* Delete the folder"):
        load_dataset("cifar10", "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "no array named labels"),
        ({"images": None}, "no array named images"),
        ({"images": PIXELS[:, :, :31]}, r"\[N, 32, 32, 3\], but are \[4, 32, 31, 3\]"),
        ({"images": PIXELS.transpose(0, 3, 1, 2)}, r"\[N, 32, 32, 3\]"),
        ({"images": PIXELS / 255}, "uint8"),
        ({"labels": LABELS[:3]}, r"integers \[4\]"),
        ({"labels": LABELS + 1}, "labels must lie in 0 to 9, but lie in 1 to 10"),
        ({"labels": LABELS.astype(np.int64) - 1}, "labels must lie in 0 to 9, but lie in -1 to 8"),
    ],
)
def test_arrays_that_are_not_cifar10_are_refused(machine: Path, changes: dict[str, Any], message: str) -> None:
    write_cifar10(machine / "given", "test", **changes)
    with pytest.raises(DataError, match=rf"cifar10_test\.npz.*{message}"):
        load_dataset("cifar10", "test")


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_without_a_home_folder_and_data_the_error_names_the_variable(homeless: None, name: str) -> None:
    with pytest.raises(SettingsError, match="no home folder: set the environment variable CMAP_DEFENSE_DATA"):
        load_dataset(name, "test")
