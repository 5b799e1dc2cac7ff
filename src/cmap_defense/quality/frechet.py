"""The Frechet distance between two sets of feature vectors, each taken for a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from cmap_defense.errors import InputTypeError, InputValueError


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """d^2 of ``gaussian_distance`` between the Gaussians with the means and covariances of two sets.

    It is what FID is in the features of one Inception network (Heusel et al. 2017, arXiv 1706.08500, eq. 6), in
    whatever features it is given; distances in other features are other quantities.

    Few vectors make it too large: two sets of n vectors from one law differ by about c / n, where c is the law's own
    (Chong and Forsyth 2020, arXiv 1911.07023). Compare it between
    sets of the same sizes only, such as with that of two halves of real data.

    Args:
        first: float [N, d]. N is above d: with fewer vectors the covariance has no full rank, and the distance shows
            little but their number.
        second: float [M, d], M above d.

    Returns:
        At least 0, computed in float64; 0 for equal sets, up to rounding.

    Raises:
        InputTypeError, InputValueError: they are something else, too few, or not finite.
    """
    for name, features in (("first", first), ("second", second)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise InputTypeError(f"frechet_distance.{name} must be a floating-point tensor [N, d].")
        if features.ndim != 2 or features.shape[1] < 1:
            raise InputValueError(f"frechet_distance.{name} must be [N, d], but is {list(features.shape)}.")
        lacking = too_few(*features.shape)
        if lacking is not None:
            raise InputValueError(f"frechet_distance.{name}: {lacking}")
        if not torch.isfinite(features).all():
            raise InputValueError(f"frechet_distance.{name} must be finite, but holds NaN or infinite values.")
    sizes = first.shape[1], second.shape[1]
    if sizes[0] != sizes[1]:
        raise InputValueError(
            f"frechet_distance is of vectors of one length, but these have {sizes[0]} and {sizes[1]}."
        )
    first, second = (part.detach().cpu().double() for part in (first, second))
    return gaussian_distance(first.mean(0), _covariance(first), second.mean(0), _covariance(second))


def gaussian_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """The squared Frechet distance of two Gaussians (Dowson and Landau 1982, J. Multivariate Analysis 12):

        d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2), roots that are symmetric: no root of a
    matrix that is not symmetric is taken, and no complex number occurs.

    Args:
        mean_1: [d].
        covariance_1: [d, d], symmetric, with no negative eigenvalues.
        mean_2: [d].
        covariance_2: as the first.
    """
    mean_1, covariance_1, mean_2, covariance_2 = (
        part.detach().cpu().double() for part in (mean_1, covariance_1, mean_2, covariance_2)
    )
    cross = torch.linalg.svdvals(_root(covariance_1) @ _root(covariance_2)).sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return max(0.0, distance.item())


def too_few(count: int, numbers: int) -> str | None:
    """What is wrong with a set of ``count`` vectors of ``numbers`` numbers, as a sentence; None where it is enough."""
    if count > numbers:
        return None
    return (
        f"{count} vectors of {numbers} numbers are too few for their covariance: at least {numbers + 1} are needed, "
        "and many more for a small bias."
    )


def _covariance(vectors: Tensor) -> Tensor:
    """[d, d], that with N - 1."""
    return torch.cov(vectors.mT).reshape(vectors.shape[1], -1)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT
