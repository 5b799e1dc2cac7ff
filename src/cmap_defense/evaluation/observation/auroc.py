"""How well a number tells two kinds of images apart, with the interval that their counts allow."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from cmap_defense.errors import InputValueError

__all__ = ["AUROC"]

Z95 = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class AUROC:
    """The area under the receiver operating characteristic: P(a > b) + P(a = b) / 2 for a value a of one kind and b of
    the other; 0.5 where they cannot be told apart.

    value: in [0, 1]. count: values of the first kind. against: values of the other.
    """

    value: float
    count: int
    against: int

    @classmethod
    def of(cls, values: Tensor, against: Tensor) -> AUROC:
        """From float [N] and [M]. Raises :class:`InputValueError` for others, and where one is empty or not finite."""
        if values.ndim != 1 or against.ndim != 1 or not len(values) or not len(against):
            raise InputValueError(
                f"AUROC is of two lists of numbers, not empty, but these are {list(values.shape)} and "
                f"{list(against.shape)}."
            )
        if not (torch.isfinite(values).all() and torch.isfinite(against).all()):
            raise InputValueError("AUROC is of finite numbers, but these have NaN or infinite values.")
        order = against.sort().values
        below, upto = (torch.searchsorted(order, values.to(order), right=right) for right in (False, True))
        area = (below + upto).double().sum().item() / (2 * len(values) * len(against))
        return cls(area, len(values), len(against))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval in [0, 1]: the areas A with |value - A| <= 1.96 sd(A), by the variance of Hanley and McNeil
        (1982, Radiology 143)::

            sd(A)^2 = [A (1 - A) + (N - 1)(A / (2 - A) - A^2) + (M - 1)(2 A^2 / (1 + A) - A^2)] / (N M)

        The variance is taken at the bound and not at the value (as in Wilson's interval; Newcombe 2006, Statistics in
        Medicine 25), so that it does not vanish where all values lie on one side. It takes the two lists for
        independent; values of the same images, clean and attacked, are closer together than that allows for.
        """
        return self._bound(0.0), self._bound(1.0)

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

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"
