"""The selection of images: the right ones of a data set, with their labels, or an error."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cmap_defense import PurifiedClassifier
from cmap_defense.classifier.speed import undefended_logits
from cmap_defense.data import SelectedImages, Subset, load_dataset, open_dataset
from cmap_defense.data.selection import labelled_data
from cmap_defense.embedded import CLASS_NAMES, load_classifier, load_test_images
from cmap_defense.errors import (
    ClassifierError,
    CmapError,
    DataError,
    InputTypeError,
    InputValueError,
    SettingsError,
    UnknownNameError,
)
from toys import uniform

IMAGES = uniform(7, 3, 8, 6, seed=0)
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2])
RANDOM = Subset(count=4, order="random", seed=1)
DRAWN = np.random.RandomState(1).choice(7, 4, replace=False).tolist()


class Items:
    """A data set as torch's: an image and its label for each index."""

    def __init__(self, images: Any = IMAGES, labels: Any = LABELS) -> None:
        self.images, self.labels, self.read = images, labels, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        assert type(index) is int
        self.read.append(index)
        return self.images[index], self.labels[index]


class Named(Items):
    classes = ("zero", "one")


@dataclasses.dataclass
class Part:
    unit: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = ("a", "b")
    labels_known: bool = True


class Room:
    """A data set that gives some of its images at once."""

    labels = LABELS
    class_names = None

    def __len__(self) -> int:
        return len(IMAGES)

    def select(self, positions: Tensor) -> Part:
        return Part(IMAGES[positions], LABELS[positions])


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES.double(), LABELS.int()),
        Items(),
        Items(labels=LABELS.tolist()),
        Items(labels=LABELS.numpy()),
        TensorDataset(IMAGES, LABELS),
        Room(),
    ],
    ids=["pair", "list", "other types", "items", "plain labels", "numpy's labels", "torch's", "room"],
)
@pytest.mark.parametrize("subset", [Subset(), Subset(count=2), RANDOM])
def test_the_images_that_are_wanted(data: Any, subset: Subset) -> None:
    found = SelectedImages.of(data, subset)
    positions = subset.indices(7)
    assert found.positions.tolist() == positions
    assert torch.equal(found.images, IMAGES[positions])
    assert torch.equal(found.labels, LABELS[positions])
    assert (found.images.dtype, found.labels.dtype, found.positions.dtype) == (torch.float32, torch.int64, torch.int64)
    assert len(found) == len(positions)


def test_only_the_images_that_are_wanted_are_read_each_once() -> None:
    data = Items()
    SelectedImages.of(data, RANDOM)
    assert data.read == DRAWN


def test_names_of_classes_are_kept_where_there_are_some() -> None:
    names = [SelectedImages.of(data, Subset()).class_names for data in ((IMAGES, LABELS), Items(), Named(), Room())]
    assert names == [None, None, ("zero", "one"), ("a", "b")]


WRONG: dict[str, tuple[Any, type[CmapError], str]] = {
    "arrays": ((IMAGES.numpy(), LABELS.numpy()), InputTypeError, "A pair must be two tensors"),
    "more labels": ((IMAGES, torch.arange(8)), InputTypeError, "There are 7 images, but 8 labels"),
    "no data set": (7, InputTypeError, "int has none"),
    "an iterator": (iter([]), InputTypeError, "A data set has a length and items"),
    "too few": ((IMAGES[:3], LABELS[:3]), SettingsError, "4 images are to be used, but the data set has 3"),
    "8-bit": (((IMAGES * 255).to(torch.uint8), LABELS), InputTypeError, r"images\.float\(\)\.div\(255\)"),
    "normalised": ((IMAGES * 4 - 2, LABELS), InputValueError, r"Images must lie in \[0, 1\]"),
    "one image": ((IMAGES[:, 0], LABELS), InputValueError, r"Images must be \[B, C, H, W\]"),
    "NaN": ((torch.where(IMAGES > 0.99, torch.nan, IMAGES), LABELS), InputValueError, "Images must be finite"),
    "fractions": ((IMAGES, LABELS.float()), InputTypeError, "labels must be integers, one per image"),
    "one-hot": ((IMAGES, torch.eye(7, dtype=torch.int64)), InputTypeError, r"are torch.int64 \[4, 7\]"),
    "flags": ((IMAGES, LABELS > 3), InputTypeError, "labels must be integers"),
    "images alone": (list(IMAGES), DataError, r"Each item of a data set must be \(image, label\)"),
    "batches": (DataLoader(TensorDataset(IMAGES, LABELS)), InputTypeError, r"a DataLoader.*give its data set, loader"),
    "no items by index": ({1, 2, 3, 4, 5}, InputTypeError, "set has none"),
    "below 0": ((IMAGES, LABELS - 3), InputValueError, r"integers from 0, but that of image \d is -[12]"),
    "None": (Items(labels=[None] * 7), InputTypeError, r"that of image \d is None \(NoneType\)"),
    "a fraction": (Items(labels=[2.5] * 7), InputTypeError, r"is 2.5 \(float\)"),
    "a whole fraction": (Items(labels=LABELS.float()), InputTypeError, r"integers from 0, but .* \(Tensor\)"),
    "text": (Items(labels=list("3141592")), InputTypeError, r"is '\d' \(str\)"),
    "a flag": (Items(labels=[True] * 7), InputTypeError, r"is True \(bool\)"),
    "one-hot items": (Items(labels=torch.eye(7)), InputTypeError, "integers from 0"),
    "pictures": (Items(images=["x"] * 7), DataError, "but are str: give it transform="),
    "sizes": (
        Items(images=[uniform(3, 8, 6 + n, seed=0) for n in range(7)]),
        DataError,
        "The images must have one size, but have",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_data_is_refused(name: str) -> None:
    data, kind, said = WRONG[name]
    with pytest.raises(kind, match=said):
        SelectedImages.of(data, RANDOM)


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    """What is read as label 0 for a training would be an accuracy of nothing here."""
    np.savez(tmp_path / "some.npz", images=np.zeros((3, 4, 5, 3), dtype=np.uint8), y=np.arange(3))
    with pytest.raises(DataError, match="no labels"):
        SelectedImages.of(load_dataset(tmp_path / "some.npz"), Subset(count=2))


def grey_folder(folder: Path) -> Tensor:
    """One image file of each of three classes below ``folder``/test; gives the images, uint8 [3, 1, 8, 6]."""
    images = (uniform(3, 1, 8, 6, seed=4) * 255).round().to(torch.uint8)
    for label, image in enumerate(images):
        (folder / "test" / f"class-{label}").mkdir(parents=True)
        Image.fromarray(image[0].numpy()).save(folder / "test" / f"class-{label}" / "0.png")
    return images


@pytest.fixture(scope="module")
def grey_model() -> PurifiedClassifier:
    return PurifiedClassifier(load_classifier(), "fashion-mnist-ct").eval()


@pytest.mark.parametrize("kind", [str, Path, open_dataset])
def test_a_folder_is_read_in_the_channels_of_the_backbone(
    tmp_path: Path, grey_model: PurifiedClassifier, kind: Any
) -> None:
    images = grey_folder(tmp_path)
    data = kind(tmp_path) if kind is not open_dataset else open_dataset(tmp_path, "test")
    found = SelectedImages.of(labelled_data(data, grey_model.image_shape[0]), Subset())
    assert torch.equal(found.images, images.float() / 255)
    assert found.labels.tolist() == [0, 1, 2]
    assert found.class_names == ("class-0", "class-1", "class-2")
    assert SelectedImages.of(labelled_data(data), Subset()).images.shape == (3, 3, 8, 6)


def test_what_the_command_line_takes_is_opened(tmp_path: Path) -> None:
    embedded = SelectedImages.of("embedded", Subset(count=3))
    assert torch.equal(embedded.images, load_test_images()[0][:3])
    assert torch.equal(embedded.labels, load_test_images()[1][:3])
    assert embedded.class_names == CLASS_NAMES
    np.savez(tmp_path / "some.npz", images=np.full((2, 4, 5, 3), 51, dtype=np.uint8), labels=np.arange(2))
    found = SelectedImages.of(tmp_path / "some.npz", Subset())
    assert torch.equal(found.images, torch.full((2, 3, 4, 5), 0.2))
    with pytest.raises(UnknownNameError, match="no data set 'fashion-mnits'"):
        SelectedImages.of("fashion-mnits", Subset())


def test_a_classifier_that_does_not_take_the_images_is_named() -> None:
    grey, three = torch.rand(1, 1, 28, 28), torch.nn.Conv2d(3, 2, 3)
    with pytest.raises(ClassifierError, match=r"'other' raised RuntimeError for an image \[1, 1, 28, 28\].*expand"):
        undefended_logits(three, grey, "other")
    behind = PurifiedClassifier(three, backbone="fashion-mnist-ct").eval()
    with pytest.raises(ClassifierError, match="'defended' raised RuntimeError"):
        undefended_logits(behind, grey, "defended")

    def own(images: Tensor) -> Tensor:
        raise DataError("own")

    with pytest.raises(DataError, match="own"):
        undefended_logits(own, grey, "defended")
