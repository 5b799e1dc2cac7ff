"""The images of an evaluation: which of a data set, read once, checked once."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cmap_defense.data import ImageSource
from cmap_defense.errors import DataError, InputTypeError
from cmap_defense.evaluation.protocol import Subset
from cmap_defense.inputs import check_finite, check_images, check_unit_range

__all__ = ["EvaluationImages"]


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationImages:
    """images: float32 [B, C, H, W] in [0, 1]. labels: int64 [B]. positions: int64 [B], in the data set. All on the CPU.
    class_names: where they are known."""

    images: Tensor
    labels: Tensor
    positions: Tensor
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(cls, data: Any, subset: Subset) -> EvaluationImages:
        """The images of a data set that ``subset`` names.

        Args:
            data: what :func:`~cmap_defense.data.open_dataset` or :func:`~cmap_defense.data.load_dataset` gives; a pair
                of images [N, C, H, W] in [0, 1] and labels [N]; or a data set of torch's that gives such an image and
                its label for each index.

        Raises:
            InputTypeError, InputValueError, DataError: it is something else.
            SettingsError: it has too few images.
        """
        if isinstance(data, (tuple, list)) and len(data) == 2:
            images, labels = data
            if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
                raise InputTypeError("A pair must be two tensors, images [N, C, H, W] and labels [N].")
            if len(images) != len(labels):
                raise InputTypeError(f"There are {len(images)} images, but {len(labels)} labels.")
            positions = torch.tensor(subset.indices(len(images)))
            return cls._checked(images.detach().cpu()[positions], labels.detach().cpu()[positions], positions, None)
        if not hasattr(data, "__len__"):
            raise InputTypeError(f"A data set has a length and items, but {type(data).__name__} has none.")
        positions = torch.tensor(subset.indices(len(data)))
        if isinstance(data, ImageSource):
            part = data.select(positions)
            if not part.labels_known:
                raise DataError("The data set has no labels (an .npz file has them in an array named labels).")
            return cls._checked(part.unit, part.labels, positions, part.class_names)
        items = [data[position] for position in positions.tolist()]
        if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
            raise DataError("Each item of a data set must be (image, label).")
        if not all(isinstance(image, Tensor) for image, _ in items):
            raise DataError(
                "The images of a data set must be tensors [C, H, W] in [0, 1], "
                f"but are {type(items[0][0]).__name__}: give it transform=torchvision.transforms.ToTensor()."
            )
        shapes = {tuple(image.shape) for image, _ in items}
        if len(shapes) > 1:
            raise DataError(
                f"The images must have one size, but have {sorted(shapes)[:3]}: give the data set a resize."
            )
        images = torch.stack([image for image, _ in items])
        labels = torch.tensor([int(label) for _, label in items])
        names = getattr(data, "classes", None)
        return cls._checked(images, labels, positions, None if names is None else tuple(map(str, names)))

    @classmethod
    def _checked(
        cls, images: Tensor, labels: Tensor, positions: Tensor, class_names: tuple[str, ...] | None
    ) -> EvaluationImages:
        check_finite(check_images(images))
        check_unit_range(images, inputs="unit")
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != images.shape[:1]:
            raise InputTypeError(
                f"labels must be integers, one per image, but are {labels.dtype} {list(labels.shape)}."
            )
        return cls(images.float(), labels.long(), positions, class_names)
