"""Accuracies with the interval that their number of images allows."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from cmap_defense.errors import InputValueError

__all__ = ["Accuracy", "wilson_interval"]

Z95 = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` images, with the 95 % Wilson interval.

    correct: in [0, total]; not a whole number where each image counts for the share of its answers that are right. The
    interval is then wider than it need be, since such shares vary less than answers that are right or wrong.
    """

    correct: float
    total: int

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor) -> Accuracy:
        """From predicted and true classes, integers [B] each. Raises :class:`InputValueError` on other shapes."""
        if predicted.shape != labels.shape or predicted.ndim != 1:
            raise InputValueError(
                f"Predictions {list(predicted.shape)} and labels {list(labels.shape)} must be [B] alike."
            )
        return cls(int(torch.eq(predicted, labels).sum().item()), len(labels))

    @classmethod
    def mean(cls, right: Tensor) -> Accuracy:
        """From [B], bool or shares in [0, 1]. Raises :class:`InputValueError` on another shape."""
        if right.ndim != 1:
            raise InputValueError(f"right must be [B], but is {list(right.shape)}.")
        correct = round(right.double().sum().item(), 9)  # equal shares in any order have the same sum
        return cls(int(correct) if correct == int(correct) else correct, len(right))

    @property
    def value(self) -> float:
        """The share in [0, 1]; NaN for no images."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval in [0, 1]."""
        return wilson_interval(self.correct, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


def wilson_interval(correct: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927, JASA 22); (0, 1) for no images.

    Raises:
        InputValueError: not 0 <= correct <= total.
    """
    if not 0 <= correct <= total:
        raise InputValueError(f"correct must be between 0 and total, but is {correct} of {total}.")
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == total else (centre + half) / scale
    return low, high
