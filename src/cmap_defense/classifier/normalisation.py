"""The affine map between images in [0, 1] and what a classifier was trained on, channel by channel."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Self

from cmap_defense.common.settings import require_numbers
from cmap_defense.errors import SettingsError


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
