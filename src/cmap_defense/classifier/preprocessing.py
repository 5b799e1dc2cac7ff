"""Between the caller's images, the backbone's and the classifier's: units, sizes, normalisation, every check."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from cmap_defense.classifier.cautions import level_of_caller
from cmap_defense.common.inputs import (
    RESIZE_MODES,
    check_device,
    check_finite,
    check_images,
    check_shape,
    clamp_straight_through,
    eight_bit_hint,
    range_outside,
    range_text,
    resize_images,
)
from cmap_defense.common.settings import require_choice, require_numbers
from cmap_defense.errors import InputRangeWarning, InputValueError, SettingsError


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """The map image -> (image - mean) / std.

    Attributes:
        mean: one number per channel.
        std: one number per channel, above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, normalize: Any, channels: int, owner: str = "PurifiedClassifier") -> Self:
        """From (mean, std), numbers or one number per channel each, or a transform with both, such as torchvision's.

        Raises:
            SettingsError: it is something else.
        """
        if not isinstance(normalize, (Sequence, Tensor, np.ndarray)) and hasattr(normalize, "mean"):
            pair = [getattr(normalize, name, None) for name in ("mean", "std")]
            # torchvision takes one number in a list for all channels
            normalize = [part[0] if isinstance(part, Sequence) and len(part) == 1 else part for part in pair]
        if not isinstance(normalize, (Sequence, Tensor, np.ndarray)) or len(normalize) != 2:
            raise SettingsError(
                "normalize must be (mean, std), or one transform such as torchvision.transforms.Normalize(mean, std), "
                f"but is {normalize!r}."
            )
        mean, std = (v.tolist() if isinstance(v, (Tensor, np.ndarray)) else v for v in normalize)
        mean, std = ([v] * channels if isinstance(v, numbers.Real) else v for v in (mean, std))
        mean = require_numbers(owner, "normalize mean", mean, length=channels)
        std = require_numbers(owner, "normalize std", std, length=channels, above=0.0)
        if max(mean) > 2:
            raise SettingsError(
                f"{owner}.normalize is for images in [0, 1], but its mean {mean} looks like that of images from 0 to "
                "255: divide mean and std by 255."
            )
        return cls(mean, std)

    def apply(self, images: Tensor) -> Tensor:
        """(images - mean) / std, [B, C, H, W]."""
        return (images - self._column(images, self.mean)) / self._column(images, self.std)

    def undo(self, images: Tensor) -> Tensor:
        """images std + mean, [B, C, H, W]."""
        return images * self._column(images, self.std) + self._column(images, self.mean)

    def slack(self, rounding: float) -> float:
        """How far outside [0, 1] ``undo`` may end for images that were rounded by ``rounding`` of their size."""
        return 4 * rounding * (1 + max(map(abs, (*self.mean, *self.std))))

    @staticmethod
    def _column(images: Tensor, values: tuple[float, ...]) -> Tensor:
        return images.new_tensor(values)[:, None, None]


OUT_OF_RANGE = ("auto", "clamp", "raise")

OVERSHOOT = 0.5
"""How far outside [0, 1] images may be under "auto" where no gradient is wanted."""

EIGHT_BIT = 20.0
"""Images from 0 to more than this are 8-bit under "auto", whether a gradient is wanted or not."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images come in and go out.

    Attributes:
        image_shape: (C, H, W) of the backbone's.
        inputs: "unit" or "normalized", of the caller's.
        resize: the mode, or None where other sizes are refused.
        normalisation: what the classifier expects, or None.
        out_of_range: "auto", "clamp" or "raise", what is done with values outside [0, 1].
    """

    image_shape: tuple[int, int, int]
    inputs: str
    resize: str | None
    normalisation: Normalisation | None
    out_of_range: str = "auto"
    _warned: list[bool] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        image_shape: tuple[int, int, int],
        inputs: str,
        normalize: Any,
        resize: str | bool | None,
        out_of_range: str,
    ) -> Self:
        """From the wrapper's options. Raises ``SettingsError`` for one that is out of its range."""
        inputs = "normalized" if inputs == "normalised" else inputs
        require_choice("PurifiedClassifier", "inputs", inputs, ("unit", "normalized"))
        if normalize is None and inputs == "normalized":
            raise SettingsError('inputs="normalized" needs normalize=(mean, std), those that the images went through.')
        mode = "bilinear" if resize is True else None if resize is None or resize is False else resize
        if mode is not None:
            require_choice("PurifiedClassifier", "resize", mode, RESIZE_MODES)
        require_choice("PurifiedClassifier", "out_of_range", out_of_range, OUT_OF_RANGE)
        normalisation = None if normalize is None else Normalisation.of(normalize, image_shape[0])
        return cls(image_shape, inputs, mode, normalisation, out_of_range)

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
        return self._bounded(images, slack)

    def _bounded(self, images: Tensor, slack: float) -> Tensor:
        """Images that were in [0, 1] up to ``slack``, the others as ``out_of_range`` says."""
        if self.out_of_range == "clamp":
            return clamp_straight_through(images)
        found = range_outside(images, slack)
        if found is None:
            return images
        if self.out_of_range == "auto":
            eight_bit = found[0] >= 0 and found[1] > EIGHT_BIT
            if images.requires_grad and torch.is_grad_enabled() and not eight_bit:
                return clamp_straight_through(images, slack)
            if found[0] >= -OVERSHOOT and found[1] <= 1 + OVERSHOOT:
                self._warn_once(found)
                return clamp_straight_through(images, slack)
        raise InputValueError(self._range_message(found, ".") + ".")

    def _range_message(self, found: tuple[float, float], done: str) -> str:
        """What is wrong with values in this range, what was done, and what to do."""
        begin = f"Images must lie in [0, 1], but lie in {range_text(found)}{done} "
        hint = "After undoing normalize=(mean, std): are mean and std those that the images were normalised with?"
        if self.inputs != "normalized":
            if eight_bit_hint(found):
                return begin + eight_bit_hint(found).removesuffix(".")
            hint = 'If they are normalised, use PurifiedClassifier(..., normalize=(mean, std), inputs="normalized").'
        attack = 'For an attack that leaves [0, 1] on its way, use PurifiedClassifier(..., out_of_range="clamp")'
        return f"{begin}{hint} {attack}"

    def _warn_once(self, found: tuple[float, float]) -> None:
        if not self._warned:
            self._warned.append(True)
            text = self._range_message(found, ", and were clamped.") + ", which does the same without this warning."
            warnings.warn(text, InputRangeWarning, stacklevel=level_of_caller())

    def resized(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Images [M, C, H, W] in [0, 1] at another size; raises InputValueError where images are not resized."""
        if self.resize is None and tuple(size) != tuple(images.shape[2:]):
            raise InputValueError(
                f"Images of {images.shape[2]} x {images.shape[3]} are wanted at {size[0]} x {size[1]}, "
                "but this wrapper does not resize: make it with resize=True."
            )
        return images if self.resize is None else resize_images(images, size, self.resize)

    def to_classifier(self, images: Tensor) -> Tensor:
        """Unit images as the classifier expects them."""
        return images if self.normalisation is None else self.normalisation.apply(images)
