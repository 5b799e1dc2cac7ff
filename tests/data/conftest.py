"""A machine without any data set and without a network, and the files that tests put on it."""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST

from cmap_defense.data import known


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder; the environment names no folder, and a download ends the test."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CMAP_DEFENSE_DATA", raising=False)
    monkeypatch.setattr(known, "_SYSTEM_FOLDERS", ())

    def download(self: object) -> None:
        raise AssertionError("torchvision would download")

    monkeypatch.setattr(CIFAR10, "download", download)
    monkeypatch.setattr(FashionMNIST, "download", download)
    return folder


@pytest.fixture
def cifar10_batches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Mapping[str, np.ndarray]]:
    """A function that writes five batches of two images and a test batch of three, in torchvision's layout below a
    folder, and gives the images of each split, uint8 [N, 32, 32, 3]; image i is of class i."""

    def write(root: Path) -> Mapping[str, np.ndarray]:
        folder = root / CIFAR10.base_folder
        folder.mkdir(parents=True)
        rng = np.random.RandomState(2)
        images = {"train": rng.randint(0, 256, (10, 32, 32, 3)), "test": rng.randint(0, 256, (3, 32, 32, 3))}
        images = {split: values.astype(np.uint8) for split, values in images.items()}
        lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}

        def put(name: str, content: object) -> str:
            data = pickle.dumps(content, protocol=2)
            (folder / name).write_bytes(data)
            return hashlib.md5(data).hexdigest()

        for i in range(5):
            rows = images["train"][2 * i : 2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1)
            name = f"data_batch_{i + 1}"
            lists["train_list"].append([name, put(name, {"data": rows, "labels": [2 * i, 2 * i + 1]})])
        rows = images["test"].transpose(0, 3, 1, 2).reshape(3, -1)
        lists["test_list"].append(["test_batch", put("test_batch", {"data": rows, "labels": [0, 1, 2]})])
        for name, files in lists.items():
            monkeypatch.setattr(CIFAR10, name, files)
        checksum = put("batches.meta", {"label_names": ["a"] * 10})
        monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksum})
        return images

    return write


@pytest.fixture
def picture_folders() -> Callable[..., dict[Path, np.ndarray]]:
    """A function that writes a folder per class with PNG files in it: ``write(root, ant=[(7, 5), (8, 6)], ...)`` for
    heights and widths; it gives their pixels, uint8 [H, W, 3], in the order of the listing."""

    def write(root: Path, **classes: list[tuple[int, int]]) -> dict[Path, np.ndarray]:
        rng = np.random.RandomState(3)
        written = {}
        for name in sorted(classes):
            (root / name).mkdir(parents=True)
            for i, size in enumerate(classes[name]):
                path = root / name / f"{i}.png"
                written[path] = rng.randint(0, 256, (*size, 3)).astype(np.uint8)
                Image.fromarray(written[path]).save(path)
        return written

    return write
