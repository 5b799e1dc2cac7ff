"""Folders of class folders: what is listed, what is read and when, resizing and cropping."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from cmap_defense.data import FolderImages, ImageSource, folders, load_dataset, open_dataset, read_image
from cmap_defense.errors import DataError

Writer = Callable[..., dict[Path, np.ndarray]]


def channels_first(pixels: list[np.ndarray]) -> torch.Tensor:
    return torch.stack([torch.tensor(p).permute(2, 0, 1) for p in pixels])


def test_classes_and_files_come_in_alphabetical_order(tmp_path: Path, picture_folders: Writer) -> None:
    pixels = picture_folders(tmp_path, wasp=[(7, 5)], ant=[(7, 5)] * 2, bee=[(7, 5)])
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    source = open_dataset(tmp_path)
    assert isinstance(source, FolderImages)
    assert isinstance(source, ImageSource)
    assert source.class_names == ("ant", "bee", "wasp")
    assert source.labels.dtype == torch.int64
    assert source.labels.tolist() == [0, 0, 1, 2]
    assert source.paths == tuple(pixels)
    assert len(source) == 4
    assert source.image_size == (7, 5)
    chosen = source.select([3, 1])
    assert chosen.images.dtype == torch.uint8
    assert torch.equal(chosen.images, channels_first([pixels[source.paths[3]], pixels[source.paths[1]]]))
    assert chosen.labels.tolist() == [2, 0]
    assert chosen.class_names == ("ant", "bee", "wasp")


def test_only_what_is_selected_is_read(
    tmp_path: Path, picture_folders: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture_folders(tmp_path, ant=[(7, 5)] * 3, bee=[(7, 5)])
    read = []

    def counted(path: Path, channels: int) -> torch.Tensor:
        read.append(path)
        return read_image(path, channels)

    monkeypatch.setattr(folders, "read_image", counted)
    source = open_dataset(tmp_path, size=4)
    assert isinstance(source, FolderImages)
    assert source.image_size == (4, 4)
    assert read == []
    source.select([2, 1])
    assert read == [source.paths[2], source.paths[1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.lists(st.integers(0, 3), max_size=6), data=st.data())
def test_a_selection_of_a_selection_is_the_selection_of_its_indices(
    tmp_path: Path, picture_folders: Writer, first: list[int], data: st.DataObject
) -> None:
    if not (tmp_path / "ant").exists():
        picture_folders(tmp_path, ant=[(7, 5), (6, 8)], bee=[(5, 5), (9, 4)])
    second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=6) if first else st.just([]))
    source = open_dataset(tmp_path, size=3)
    once, twice = source.select([first[i] for i in second]), source.select(first).select(second)
    assert once.images.shape == (len(second), 3, 3, 3)
    assert torch.equal(twice.images, once.images)
    assert torch.equal(twice.labels, once.labels)


@pytest.mark.parametrize("size", [1, 4, 5, 11])
@pytest.mark.parametrize("shape", [(7, 5), (5, 8), (12, 5), (4, 13), (6, 6), (11, 14)])
def test_resizing_and_cropping_are_torchvisions(
    tmp_path: Path, picture_folders: Writer, shape: tuple[int, int], size: int
) -> None:
    pixels = picture_folders(tmp_path, ant=[shape, (9, 7)])
    unit = channels_first(list(pixels.values())[:1])[0] / 255
    resized = resize(unit, [size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    expected = (center_crop(resized, [size, size]) * 255).round()
    images = load_dataset(tmp_path, size=size).images
    assert images.shape == (2, 3, size, size)
    assert (images[0] - expected).abs().max() <= 1


def test_grey_when_asked_for(tmp_path: Path, picture_folders: Writer) -> None:
    pixels = picture_folders(tmp_path, ant=[(7, 5)] * 2)
    images = load_dataset(tmp_path, channels=1).images
    assert images.shape == (2, 1, 7, 5)
    for image, colours in zip(images, pixels.values(), strict=True):
        assert np.array_equal(image[0].numpy(), np.asarray(Image.fromarray(colours).convert("L")))


def test_images_of_several_sizes_need_a_size(tmp_path: Path, picture_folders: Writer) -> None:
    picture_folders(tmp_path, ant=[(7, 5), (7, 5), (6, 8)], bee=[(5, 7)])
    source = open_dataset(tmp_path)
    assert source.select([0, 1]).images.shape == (2, 3, 7, 5)
    message = r"ant/0\.png is 7 x 5 \(height x width\), but .*ant/2\.png is 6 x 8: give size"
    with pytest.raises(DataError, match=message):
        source.select([1, 2])
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, size=4).images.shape == (4, 3, 4, 4)


@pytest.mark.parametrize("broken", ["0.png", "1.png"])
@pytest.mark.parametrize("size", [None, 4])
def test_a_damaged_image_is_named_when_it_is_read(
    tmp_path: Path, picture_folders: Writer, broken: str, size: int | None
) -> None:
    picture_folders(tmp_path, ant=[(7, 5)] * 2)
    (tmp_path / "ant" / broken).write_bytes(b"no image")
    source = open_dataset(tmp_path, size=size)
    with pytest.raises(DataError, match=rf"ant/{broken}"):
        source.select([0, 1])


@pytest.mark.parametrize(
    ("there", "split", "taken"),
    [
        (("train", "test"), "train", "train"),
        (("train", "test"), "test", "test"),
        (("train", "val"), "test", "val"),
        (("train", "test", "val"), "test", "test"),
        (("val",), "test", "val"),
    ],
)
def test_the_folder_of_the_split_is_taken(
    tmp_path: Path, picture_folders: Writer, there: tuple[str, ...], split: str, taken: str
) -> None:
    for name in there:
        picture_folders(tmp_path / name, ant=[(7, 5)], bee=[(7, 5)])
    source = open_dataset(tmp_path, split)
    assert isinstance(source, FolderImages)
    assert [path.relative_to(tmp_path).as_posix() for path in source.paths] == [
        f"{taken}/ant/0.png",
        f"{taken}/bee/0.png",
    ]
    assert source.class_names == ("ant", "bee")


def test_a_folder_without_splits_is_taken_itself(tmp_path: Path, picture_folders: Writer) -> None:
    picture_folders(tmp_path, bus=[(7, 5)], train=[(7, 5)])  # a class called train, as it has no folders
    for split in ("train", "test"):
        assert open_dataset(tmp_path, split).class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("there", "split", "message"),
    [
        (("train",), "test", "folders for train, but none for test: make a folder test or val"),
        (("test", "val"), "train", "folders for test and val, but none for train: make a folder train"),
    ],
)
def test_another_split_is_not_taken_for_classes(
    tmp_path: Path, picture_folders: Writer, there: tuple[str, ...], split: str, message: str
) -> None:
    for name in there:
        picture_folders(tmp_path / name, ant=[(7, 5)])
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, split)


def test_folders_without_classes_and_classes_without_images(tmp_path: Path, picture_folders: Writer) -> None:
    with pytest.raises(DataError, match="class folder"):
        open_dataset(tmp_path)
    picture_folders(tmp_path, ant=[(7, 5)], bee=[])
    with pytest.raises(DataError, match="bee"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        FolderImages.of(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a positive integer"),
        ({"size": 4.0}, "size must be a positive integer"),
        ({"size": True}, "size must be a positive integer"),
        ({"channels": 2}, "channels must be 1 or 3"),
    ],
)
def test_sizes_and_channels_that_cannot_be(
    tmp_path: Path, picture_folders: Writer, options: dict[str, Any], message: str
) -> None:
    picture_folders(tmp_path, ant=[(7, 5)])
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, **options)


HIDDEN = [".ipynb_checkpoints", ".git", "__MACOSX", "$RECYCLE.BIN", "@eaDir", "System Volume Information"]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("below", [".", "train", "ant"])
def test_hidden_folders_are_no_classes_no_splits_and_hold_no_images(
    tmp_path: Path, picture_folders: Writer, hidden: str, below: str
) -> None:
    root = tmp_path / "train" if below == "train" else tmp_path
    pixels = picture_folders(root, ant=[(7, 5)] * 2, bee=[(7, 5)])
    picture_folders(tmp_path / below / hidden, old=[(9, 9)])
    shutil.copy(root / "bee" / "0.png", tmp_path / below / hidden / "0-checkpoint.png")
    source = open_dataset(tmp_path)
    assert isinstance(source, FolderImages)
    assert source.class_names == ("ant", "bee")
    assert source.paths == tuple(pixels)
    assert source.labels.tolist() == [0, 0, 1]


def test_without_hidden_files_the_order_is_torchvisions(tmp_path: Path, picture_folders: Writer) -> None:
    picture_folders(tmp_path, ant=[(7, 5)] * 11, B=[(7, 5)])
    picture_folders(tmp_path / "ant", a=[(7, 5)] * 2, z=[(7, 5)])
    shutil.copy(tmp_path / "B" / "0.png", tmp_path / "B" / "upper.PNG")
    expected = ImageFolder(str(tmp_path))
    source = open_dataset(tmp_path)
    assert isinstance(source, FolderImages)
    assert [str(path) for path in source.paths] == [path for path, _ in expected.samples]
    assert source.labels.tolist() == expected.targets
    assert source.class_names == tuple(expected.classes)


@pytest.mark.parametrize("beside", ["", "notes", ".ipynb_checkpoints"])
def test_a_folder_of_images_without_classes_has_no_labels(tmp_path: Path, picture_folders: Writer, beside: str) -> None:
    pixels = picture_folders(tmp_path, images=[(7, 5)] * 3)
    if beside:
        (tmp_path / "images" / beside).mkdir()
        (tmp_path / "images" / beside / "notes.txt").write_text("not an image")
    source = open_dataset(tmp_path / "images")
    assert isinstance(source, FolderImages)
    assert (source.paths, source.class_names, source.labels_known) == (tuple(pixels), None, False)
    data = load_dataset(tmp_path / "images")
    assert torch.equal(data.images, channels_first(list(pixels.values())))
    assert (data.labels.tolist(), data.class_names, data.labels_known) == ([0] * 3, None, False)


def test_a_link_to_a_folder_above_is_an_error_and_no_second_set_of_images(
    tmp_path: Path, picture_folders: Writer
) -> None:
    picture_folders(tmp_path, ant=[(7, 5)] * 2, bee=[(7, 5)])
    (tmp_path / "ant" / "more").mkdir()
    try:
        (tmp_path / "ant" / "more" / "again").symlink_to(tmp_path / "ant", target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    with pytest.raises(DataError, match=r"again is a link to .*ant, whose images are there already"):
        open_dataset(tmp_path)
