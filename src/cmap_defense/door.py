"""Between the caller's images, the backbone's and the classifier's: units, sizes, normalisation, every check."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from cmap_defense.errors import InputValueError, SettingsError
from cmap_defense.inputs import (
    RESIZE_MODES,
    check_device,
    check_finite,
    check_images,
    check_shape,
    check_unit_range,
    resize_images,
)
from cmap_defense.normalisation import Normalisation
from cmap_defense.settings import require_choice

__all__ = ["ImageDoor"]


@dataclasses.dataclass(frozen=True)
class ImageDoor:
    """How images come in and go out.

    image_shape: (C, H, W) of the backbone's. inputs: "unit" or "normalized", of the caller's.
    resize: the mode, or None where other sizes are refused. normalisation: what the classifier expects, or None.
    """

    image_shape: tuple[int, int, int]
    inputs: str
    resize: str | None
    normalisation: Normalisation | None

    @classmethod
    def of(cls, image_shape: tuple[int, int, int], inputs: str, normalize: Any, resize: str | bool | None) -> Self:
        """From the wrapper's options. Raises :class:`SettingsError` for one that is out of its range."""
        inputs = "normalized" if inputs == "normalised" else inputs
        require_choice("PurifiedClassifier", "inputs", inputs, ("unit", "normalized"))
        if normalize is None and inputs == "normalized":
            raise SettingsError('inputs="normalized" needs normalize=(mean, std), those that the images went through.')
        mode = "bilinear" if resize is True else None if resize is None or resize is False else resize
        if mode is not None:
            require_choice("PurifiedClassifier", "resize", mode, RESIZE_MODES)
        return cls(
            image_shape, inputs, mode, None if normalize is None else Normalisation.of(normalize, image_shape[0])
        )

    def to_unit(self, images: object, device: torch.device | None) -> Tensor:
        """Images in [0, 1], float32 at least, safe to be part of a graph; checked for type, device, range and shape."""
        images = check_images(images, self.image_shape[0])
        check_device(images, device)
        check_finite(images)
        if images.is_inference():
            images = images.clone()
        rounding = torch.finfo(images.dtype).eps
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        check_shape(images, self.image_shape, resizes=self.resize is not None)
        slack = 0.0
        if self.inputs == "normalized":
            assert self.normalisation is not None
            images = self.normalisation.undo(images)
            slack = self.normalisation.slack(rounding)
        check_unit_range(images, inputs=self.inputs, slack=slack)
        return images

    def resized(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Images [M, C, H, W] in [0, 1] at another size, where this door resizes at all.

        Raises:
            InputValueError: it does not, and the size is another one.
        """
        if self.resize is None and tuple(size) != tuple(images.shape[2:]):
            raise InputValueError(
                f"Images of {images.shape[2]} x {images.shape[3]} are wanted at {size[0]} x {size[1]}, "
                "but this wrapper does not resize: make it with resize=True."
            )
        return images if self.resize is None else resize_images(images, size, self.resize)

    def to_classifier(self, images: Tensor) -> Tensor:
        """Unit images as the classifier expects them."""
        return images if self.normalisation is None else self.normalisation.apply(images)
