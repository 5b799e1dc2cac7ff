"""Data sets in memory."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from cmap_defense.data import load_dataset
from cmap_defense.errors import CmapError

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 7, 6, 3)).astype(np.uint8)
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


def test_an_npz_file_gives_channels_first_images_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=IMAGES, labels=LABELS)
    data = load_dataset(tmp_path / "some.npz")
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (5, 3, 7, 6)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), IMAGES)
    assert data.labels.tolist() == LABELS.tolist()
    assert len(data[1:3]) == 2
    assert data.unit.max() <= 1


def test_grey_images_get_a_channel_and_labels_may_be_missing(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", images=IMAGES[..., 0])
    data = load_dataset(tmp_path / "grey.npz")
    assert data.images.shape == (5, 1, 7, 6)
    assert data.labels.tolist() == [0] * 5


def write_fashion(folder: Path, *, compress: bool) -> np.ndarray:
    """A data set of three images in the layout of Fashion-MNIST."""
    folder.mkdir()
    images = IMAGES[:3, ..., 0]
    files = {
        "t10k-images-idx3-ubyte": np.array([2051, 3, 7, 6], dtype=">i4").tobytes() + images.tobytes(),
        "t10k-labels-idx1-ubyte": np.array([2049, 3], dtype=">i4").tobytes() + LABELS[:3].tobytes(),
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
    monkeypatch.setenv("CMAP_DATA", str(tmp_path))
    data = load_dataset("fashion-mnist", "test")
    assert np.array_equal(data.images[:, 0].numpy(), images)
    assert data.labels.tolist() == [3, 1, 4]


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path / "fashion-mnist", compress=False)
    path = tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    monkeypatch.setenv("CMAP_DATA", str(tmp_path))
    with pytest.raises(CmapError, match="t10k-images-idx3-ubyte"):
        load_dataset("fashion-mnist", "test")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(LookupError, match="fashion-mnist"):
        load_dataset("fashion-mnits")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "no array named images"),
        ({"images": IMAGES.astype(np.float32)}, "uint8"),
        ({"images": IMAGES, "labels": LABELS[:2]}, "labels"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "labels"),
    ],
)
def test_foreign_npz_files(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(CmapError, match=message):
        load_dataset(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 truncated"])
def test_damaged_npz_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(CmapError, match=r"bad\.npz"):
        load_dataset(tmp_path / "bad.npz")


def test_pickles_inside_npz_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CmapError, match=r"bad\.npz"):
        load_dataset(tmp_path / "bad.npz")


def test_unknown_split() -> None:
    with pytest.raises(CmapError, match="train"):
        load_dataset("fashion-mnist", "validation")
