"""Which images of a data set are used, read once and checked once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import Self

from cmap_defense.common.files import tensor_checksum
from cmap_defense.common.inputs import check_finite, check_images, check_unit_range
from cmap_defense.data.folders import FolderImages
from cmap_defense.data.images import ImageSource, LabelledImages
from cmap_defense.data.sources import DATASETS, open_named
from cmap_defense.data.subset import Subset
from cmap_defense.embedded import CLASS_NAMES, load_test_images
from cmap_defense.errors import DataError, InputTypeError, InputValueError


def labelled_data(data: Any, channels: int | None = None, split: str = "test") -> Any:
    """A data set whose images have labels, opened where it is only named.

    Args:
        data: as ``SelectedImages.of`` takes it; or what the command line takes for ``--data``: a name, "embedded", an
            .npz file, a folder.
        channels: in which the images of a folder are read, unless the caller chose them; None for the data set's own.
        split: of what is only named; "embedded" is of "test".

    Raises:
        UnknownNameError: neither a known name nor a file nor a folder.
        DataError: the data set is damaged, or has no labels.
        InputTypeError: it is a DataLoader.
    """
    if isinstance(data, str) and data == "embedded" and split == "test":
        images, labels = load_test_images()
        data = LabelledImages((images * 255).round().to(torch.uint8), labels, CLASS_NAMES)
    elif isinstance(data, (str, os.PathLike)):
        data = open_named(data, split, None, None, DATASETS if split == "train" else (*DATASETS, "embedded"))
    if isinstance(data, DataLoader):
        raise InputTypeError("data is a DataLoader, which gives batches: give its data set, loader.dataset.")
    if isinstance(data, FolderImages) and data.channels is None and channels is not None:
        data = dataclasses.replace(data, channels=channels)
    if not getattr(data, "labels_known", True):
        raise DataError(
            "The data set has no labels, which are needed here: a folder has one folder of images per class, such as "
            "images/cat/1.png and images/dog/1.png, and an .npz file has an array named labels."
        )
    return data


@dataclasses.dataclass(frozen=True, eq=False)
class SelectedImages:
    """Images of a data set, on the CPU.

    Attributes:
        images: float32 [B, C, H, W] in [0, 1].
        labels: int64 [B].
        positions: int64 [B], in the data set.
        class_names: one per class, where they are known.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(cls, data: Any, subset: Subset | Tensor) -> Self:
        """The images of a data set that ``subset`` names.

        Args:
            data: what ``open_dataset`` or ``load_dataset`` gives; a pair
                of images [N, C, H, W] in [0, 1] and labels [N]; or a data set of torch's that gives such an image and
                its label for each index. What ``labelled_data`` opens is opened. Labels are integers from 0.
            subset: which images; or their positions, int64 [M].

        Raises:
            InputTypeError: it is something else.
            InputValueError: its images are not as above.
            DataError: it cannot be read.
            UnknownNameError: there is no data set of this name.
            SettingsError: it has too few images.
        """
        data = labelled_data(data)

        def chosen(total: int) -> Tensor:
            return subset if isinstance(subset, Tensor) else torch.tensor(subset.indices(total), device="cpu")

        if isinstance(data, (tuple, list)) and len(data) == 2:
            images, labels = data
            if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
                raise InputTypeError("A pair must be two tensors, images [N, C, H, W] and labels [N].")
            if len(images) != len(labels):
                raise InputTypeError(f"There are {len(images)} images, but {len(labels)} labels.")
            positions = chosen(len(images))
            return cls._checked(images.detach()[positions].cpu(), labels.detach()[positions].cpu(), positions, None)
        if isinstance(data, Mapping):
            raise InputTypeError("data is a dictionary: give a pair, (images, labels).")
        if not hasattr(data, "__len__") or not (hasattr(data, "__getitem__") or isinstance(data, ImageSource)):
            raise InputTypeError(f"A data set has a length and items, but {type(data).__name__} has none.")
        positions = chosen(len(data))
        if isinstance(data, ImageSource):
            part = labelled_data(data.select(positions))
            return cls._checked(part.unit, part.labels, positions, part.class_names)
        items = [data[position] for position in positions.tolist()]
        if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
            raise DataError(
                "Each item of a data set must be (image, label). Of two tensors give both, as a pair: (images, labels)."
            )
        images, labels = zip(*items, strict=True)
        if not all(isinstance(image, Tensor) for image in images):
            raise DataError(
                "The images of a data set must be tensors [C, H, W] in [0, 1], "
                f"but are {type(images[0]).__name__}: give it transform=torchvision.transforms.ToTensor()."
            )
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(f"The images must have one size, but have {sorted(shapes)[:3]}: give it a resize.")
        numbers = torch.tensor(
            [_label(label, position) for label, position in zip(labels, positions, strict=True)], device="cpu"
        )
        names = getattr(data, "classes", None)
        return cls._checked(torch.stack(images), numbers, positions, None if names is None else tuple(map(str, names)))

    def checksum(self) -> str:
        """SHA-256 of images, labels and positions."""
        return tensor_checksum((name, getattr(self, name)) for name in ("images", "labels", "positions"))

    def check_classes(self, classes: int, model: str) -> None:
        """Raises ``InputValueError`` when there is a label that a model of so many classes does not have."""
        for row in (self.labels >= classes).nonzero().flatten()[:1].tolist():
            raise InputValueError(
                f"Labels must be from 0 to {classes - 1}, the classes of the model {model!r}, but that of image "
                f"{int(self.positions[row])} is {int(self.labels[row])}."
            )

    @classmethod
    def _checked(cls, images: Tensor, labels: Tensor, positions: Tensor, class_names: tuple[str, ...] | None) -> Self:
        check_finite(check_images(images))
        check_unit_range(images)
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != images.shape[:1]:
            raise InputTypeError(
                f"labels must be integers, one per image, but are {labels.dtype} {list(labels.shape)}."
            )
        for row in (labels < 0).nonzero().flatten()[:1].tolist():
            raise InputValueError(
                f"Labels must be integers from 0, but that of image {int(positions[row])} is {int(labels[row])}: leave "
                "out images without a class."
            )
        return cls(images.float(), labels.long(), positions, class_names)


def _label(label: Any, position: Any) -> int:
    """A label that came with one image."""
    number = label.item() if isinstance(label, Tensor) and label.ndim == 0 else label
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise InputTypeError(
            f"Labels must be integers from 0, but that of image {int(position)} is {label!r} ({type(label).__name__})."
        )
    return int(number)
