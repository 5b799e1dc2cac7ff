"""Shares and areas with the interval that their number of images allows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from cmap_defense.errors import InputValueError

Z95 = 1.959963984540054
"""The normal quantile of 95 % intervals."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of correct images, with the 95 % Wilson interval.

    Args:
        correct: in [0, total]; not a whole number where each image counts for the share of its predictions that are
            right. The interval is then wider than it need be, since such shares vary less.
        total: number of images.
    """

    correct: float
    total: int

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor) -> Self:
        """From classes.

        Args:
            predicted: integers [B].
            labels: integers [B], the true classes.

        Raises:
            InputValueError: they have other shapes.
        """
        if predicted.shape != labels.shape or predicted.ndim != 1:
            raise InputValueError(
                f"Predictions {list(predicted.shape)} and labels {list(labels.shape)} must be [B] alike."
            )
        return cls(int(torch.eq(predicted, labels).sum().item()), len(labels))

    @classmethod
    def mean(cls, right: Tensor) -> Self:
        """From [B], bool or shares in [0, 1]. Raises ``InputValueError`` on another shape."""
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON, the interval included; "value" is None for no images."""
        value = self.value if self.total else None
        return {"value": value, "interval": list(self.interval), "correct": self.correct, "total": self.total}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what ``to_dict`` gives."""
        return cls(values["correct"], values["total"])

    def __str__(self) -> str:
        return interval_text(self.value, self.interval) if self.total else "no images"


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """Wilson's score interval of 95 % for a share (Wilson 1927, JASA 22); (0, 1) for no images.

    Args:
        correct: in [0, total].
        total: number of images.

    Raises:
        InputValueError: not 0 <= correct <= total.
    """
    if not 0 <= correct <= total:
        raise InputValueError(f"correct must be between 0 and total, but is {correct} of {total}.")
    if total == 0:
        return 0.0, 1.0
    share, z = correct / total, Z95
    centre = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == total else (centre + half) / scale
    return low, high


@dataclasses.dataclass(frozen=True)
class AUROC:
    """The area under the receiver operating characteristic: P(a > b) + P(a = b) / 2 for a value a of one kind and b of
    the other; 0.5 where they cannot be distinguished.

    Args:
        value: in [0, 1].
        count: number of values of the first kind.
        against: number of values of the other kind.
    """

    value: float
    count: int
    against: int

    @classmethod
    def of(cls, values: Tensor, against: Tensor) -> Self:
        """From float [N] and [M]. Raises ``InputValueError`` for others, and where one is empty or not finite."""
        if values.ndim != 1 or against.ndim != 1 or not len(values) or not len(against):
            raise InputValueError(
                f"AUROC is of two lists of numbers, not empty, but these are {list(values.shape)} and "
                f"{list(against.shape)}."
            )
        if not (torch.isfinite(values).all() and torch.isfinite(against).all()):
            raise InputValueError("AUROC is of finite numbers, but these have NaN or infinite values.")
        order = against.double().sort().values
        below, upto = (torch.searchsorted(order, values.to(order), right=right) for right in (False, True))
        area = (below + upto).double().sum().item() / (2 * len(values) * len(against))
        return cls(area, len(values), len(against))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval in [0, 1]: the areas A with |value - A| <= 1.96 sd(A), by the variance of Hanley and McNeil
        (1982, Radiology 143):

            sd(A)^2 = [A (1 - A) + (N - 1)(A / (2 - A) - A^2) + (M - 1)(2 A^2 / (1 + A) - A^2)] / (N M)

        The variance is taken at the bound and not at the value (as in Wilson's interval; Newcombe 2006, Statistics in
        Medicine 25), so that it does not vanish where all values lie on one side. It takes the two lists for
        independent; values of the same images, clean and attacked, are closer together than that allows for.
        """
        return self._bound(0.0), self._bound(1.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the interval and how it is computed."""
        method = "Hanley-McNeil variance, score interval"
        return {"value": self.value, "interval": list(self.interval), "method": method}

    def __str__(self) -> str:
        return interval_text(self.value, self.interval)

    def _bound(self, end: float) -> float:
        """Between the value, which is allowed, and an end, which is not unless it is the value."""
        if self.value == end:
            return end
        allowed, refused = self.value, end
        for _ in range(60):
            middle = (allowed + refused) / 2
            if abs(self.value - middle) <= Z95 * self._deviation(middle):
                allowed = middle
            else:
                refused = middle
        return allowed

    def _deviation(self, area: float) -> float:
        """sd(A)."""
        first = area / (2 - area) - area**2
        second = 2 * area**2 / (1 + area) - area**2
        variance = area * (1 - area) + (self.count - 1) * first + (self.against - 1) * second
        return math.sqrt(max(variance, 0.0) / (self.count * self.against))


def most_frequent(labels: Tensor, dim: int) -> Tensor:
    """The most frequent of integers along a dimension; of several the lowest, as torch.mode has it on CPUs alone."""
    return labels.cpu().mode(dim=dim).values.to(labels.device)


def standard_error(values: Tensor) -> float:
    """Of the mean of values [B]; 0 for one value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def mean_interval(values: Tensor) -> tuple[float, float | None]:
    """The mean of values [B], and the half width of its 95 % interval by Student's t; None where all are the same,
    which tells nothing about their spread."""
    error = standard_error(values)
    return values.mean().item(), student_quantile(0.975, len(values) - 1) * error if error else None


def student_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t distribution, to 1 % for p up to 0.995 and to 3 % up to 0.999: in closed form for
    one and two degrees of freedom, and for more by the expansion in powers of 1 / degrees (Abramowitz and Stegun 1964,
    26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = statistics.NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def interval_text(value: float, interval: tuple[float, float]) -> str:
    """A number with its interval, as reports show it."""
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
