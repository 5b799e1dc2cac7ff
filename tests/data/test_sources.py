"""Data sets by name, file or folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmap_defense.data import DATASETS, LabelledImages, known, load_dataset, open_dataset
from cmap_defense.errors import CmapError, DataError

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 7, 6, 3)).astype(np.uint8)
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


def test_an_npz_file_gives_channels_first_images_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=IMAGES, labels=LABELS)
    data = load_dataset(tmp_path / "some.npz")
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (5, 3, 7, 6)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), IMAGES)
    assert data.labels.tolist() == LABELS.tolist()
    assert data.class_names is None
    assert len(data[1:3]) == 2
    assert data.unit.max() <= 1


def test_grey_images_get_a_channel_and_labels_may_be_missing(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", images=IMAGES[..., 0])
    data = load_dataset(tmp_path / "grey.npz")
    assert data.images.shape == (5, 1, 7, 6)
    assert data.labels.tolist() == [0] * 5


def test_what_is_in_memory_is_opened_as_it_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=IMAGES, labels=LABELS)
    opened = open_dataset(str(tmp_path / "some.npz"))
    assert isinstance(opened, LabelledImages)
    assert torch.equal(opened.select([2, 0]).images, load_dataset(tmp_path / "some.npz").images[[2, 0]])


def test_the_split_goes_to_the_data_sets_that_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DATASETS == ("cifar10", "fashion-mnist")
    images = torch.zeros(2, 1, 7, 6, dtype=torch.uint8)

    def reader(split: str) -> LabelledImages:
        return LabelledImages(images, torch.tensor([0, 1]), ("x", split))

    monkeypatch.setattr("cmap_defense.data.sources.KNOWN", dict.fromkeys(known.KNOWN, reader))
    for name in DATASETS:
        assert load_dataset(name).class_names == ("x", "train")
        assert open_dataset(name, "test").class_names == ("x", "test")


@pytest.mark.parametrize("load", [load_dataset, open_dataset])
def test_unknown_names_list_the_known_ones(load: Any) -> None:
    with pytest.raises(LookupError, match=r"fashion-mnist.*folder of class folders"):
        load("fashion-mnits")
    with pytest.raises(LookupError, match="cifar10"):
        load("CIFAR-10")


@pytest.mark.parametrize("size", [7, 6, 5])
def test_a_size_other_than_that_of_the_images_is_refused(tmp_path: Path, size: int) -> None:
    np.savez(tmp_path / "some.npz", images=IMAGES)
    np.savez(tmp_path / "square.npz", images=IMAGES[:, :size, :size])
    with pytest.raises(DataError, match=rf"some\.npz: images are 7 x 6, not {size} x {size}: only images of a folder"):
        load_dataset(tmp_path / "some.npz", size=size)
    if size < 7:
        assert load_dataset(tmp_path / "square.npz", size=size).images.shape == (5, 3, size, size)


def test_channels_other_than_those_of_the_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=IMAGES)
    assert load_dataset(tmp_path / "some.npz", channels=3).images.shape == (5, 3, 7, 6)
    with pytest.raises(DataError, match=r"some\.npz: images have 3 channels, not 1: only images of a folder"):
        load_dataset(tmp_path / "some.npz", channels=1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "no array named images"),
        ({"images": IMAGES.astype(np.float32)}, "uint8"),
        ({"images": IMAGES[0, 0]}, r"\[N, H, W, C\] or \[N, H, W\]"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"Convert them: images\.transpose\(0, 2, 3, 1\)\."),
        ({"images": IMAGES / 255}, r"Convert them: \(images \* 255\)\.round"),
        ({"images": IMAGES[None]}, "uint8"),
        ({"images": np.array([{"a": 1}], dtype=object)}, r"bad\.npz"),
        ({"images": IMAGES, "labels": LABELS[:2]}, "labels"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "labels"),
        ({"images": IMAGES, "labels": LABELS.astype(int) - 2}, "integers from 0, but there is -1"),
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


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "single.npy", IMAGES)
    with pytest.raises(DataError, match=r"single\.npy is a single array: .* np\.savez\(path, images=array\)"):
        load_dataset(tmp_path / "single.npy")
    with pytest.raises(DataError, match=r"none\.npz cannot be read"):
        load_dataset(tmp_path / "none.npz")
    (tmp_path / "table.csv").write_text("1,2,3")
    with pytest.raises(DataError, match=r"table\.csv is no \.npz file\. Data are a name"):
        load_dataset(tmp_path / "table.csv")
