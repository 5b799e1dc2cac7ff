"""Squared maximum mean discrepancies (Gretton et al. 2012, JMLR 13): of one sample from many, and of two samples.

All kernels return float64, and all sums are taken in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import Self

from cmap_defense.common.settings import Settings, require_integer, require_number
from cmap_defense.errors import InputTypeError, InputValueError

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Samples [N, ...] and [M, ...] to their kernel values, float64 [N, M]: symmetric and positive definite."""


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """||x_i - y_j||^2 over all elements: samples [N, ...] and [M, ...] to float64 [N, M], differentiably."""
    x, y = first.flatten(1).double(), second.flatten(1).double()
    centre = y.mean(dim=0).detach() if len(y) else 0.0  # distances stay, and the terms below become small
    x, y = x - centre, y - centre
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None] - 2 * x @ y.T
    return squares.clamp_min(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Settings):
    """k(x, y) = exp(-||x - y||^2 / (2 h^2)).

    Args:
        bandwidth: h, positive, in the units of the samples.

    Raises:
        SettingsError: it is no positive number.
    """

    bandwidth: float

    def __post_init__(self) -> None:
        require_number("Gaussian", "bandwidth", self.bandwidth, above=0.0)

    @classmethod
    def median(cls, references: Tensor) -> Self:
        """With the median heuristic: h is the median distance of two different ones of the references [n, ...], the
        lower one where there are two. Raises InputTypeError or InputValueError unless they are two finite samples at
        least, of which half are not the same."""
        _check(references, "references", 2)
        pairs = torch.triu_indices(len(references), len(references), 1, device=references.device)
        found = squared_distances(references, references)[pairs[0], pairs[1]].median().sqrt().item()
        if found == 0:
            raise InputValueError(
                "The median distance of the references is 0, so half of them are the same: give a kernel of your own, "
                "Gaussian(bandwidth=...)."
            )
        return cls(bandwidth=found)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Samples [N, ...] and [M, ...] to float64 [N, M] in (0, 1]."""
        return torch.exp(-squared_distances(first, second) / (2 * self.bandwidth**2))


def mmd_distances(kernel: Kernel, samples: Tensor, references: Tensor, *, chunk: int = 256) -> Tensor:
    """The squared MMD of every single sample from all references, float64 [B]:

        MMD^2({x}, Y) = k(x, x) - (2/n) sum_i k(x, y_i) + (1/n^2) sum_ij k(y_i, y_j)

    That is the squared distance, in the kernel's space, between x and the mean of the references (the V-statistic with
    one sample on one side; an unbiased estimate does not exist, since one sample has no pair). It is 0 at least, and 0
    where all references are x. Only the middle term distinguishes two samples when k(x, x) is constant, as a Gaussian's
    is: no choice of estimator changes their order.

    Args:
        kernel: see ``Kernel``.
        samples: [B, ...].
        references: [n, ...], from whose mean the distance is measured.
        chunk: samples at a time. It changes memory, not the result beyond rounding.

    Raises:
        InputTypeError, InputValueError: the samples are not finite floats of one shape, or there is no reference.
    """
    _check(samples, "samples", 0)
    _check(references, "references", 1)
    _check_alike(samples, references)
    require_integer("mmd_distances", "chunk", chunk, minimum=1)
    with torch.no_grad():
        level = torch.stack([kernel(references, part).sum() for part in references.split(chunk)]).sum()
        found = [samples.new_zeros(0, dtype=torch.float64)]
        for part in samples.split(chunk) if len(samples) else ():
            own = kernel(part, part).diagonal()
            found.append(own - 2 * kernel(part, references).mean(dim=1) + level / len(references) ** 2)
    return torch.cat(found).clamp_min(0)


def unbiased_mmd2(kernel: Kernel, first: Tensor, second: Tensor) -> Tensor:
    """MMD^2_u between two samples [m, ...] and [n, ...], a float64 number (Gretton et al. 2012, eq. 3):

        sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1)) - 2 sum_ij k(x_i, y_j) / (m n)

    Its mean over samples is the MMD^2 of the populations, which is 0 at least and 0 for equal ones. It is below 0 for
    many samples of equal ones, since its mean is 0 there.

    Raises:
        InputTypeError, InputValueError: the samples are not finite floats of one shape, two at least on each side.
    """
    _check(first, "first", 2)
    _check(second, "second", 2)
    _check_alike(first, second)
    within = []
    for values in (kernel(first, first), kernel(second, second)):
        count = len(values)
        within.append((values.sum() - values.diagonal().sum()) / (count * (count - 1)))
    return within[0] + within[1] - 2 * kernel(first, second).mean()


def _check(samples: object, name: str, least: int) -> None:
    if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.ndim < 2:
        came = f"{samples.dtype} {list(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise InputTypeError(f"{name} must be a floating-point tensor [count, ...], but is {came}.")
    if len(samples) < least:
        raise InputValueError(f"{name} must be {least} samples at least, but there are {len(samples)}.")
    if not torch.isfinite(samples).all():
        raise InputValueError(f"{name} must be finite, but has NaN or infinite values.")


def _check_alike(first: Tensor, second: Tensor) -> None:
    if first.shape[1:] != second.shape[1:]:
        raise InputValueError(
            f"Samples of one shape can be compared, but these are {list(first.shape[1:])} and {list(second.shape[1:])}."
        )
