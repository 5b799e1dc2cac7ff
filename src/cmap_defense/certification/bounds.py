"""The statistics of randomized smoothing (Cohen et al. 2019, arXiv 1902.02918); scipy is the extra ``[certify]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmap_defense.common.optional import optional_import

ABSTAIN = -1
"""The label of an image for which there is no prediction."""


def statistics() -> Any:
    """``scipy.stats``. Raises ``MissingExtraError`` where scipy is not installed."""
    return optional_import("scipy.stats", "certify", "Certificates are computed with scipy")


def lower_bounds(counts: Tensor, n: int, alpha: float) -> Tensor:
    """One-sided lower bounds of probabilities (Clopper and Pearson 1934), each too high with probability alpha at most:
    the alpha-quantiles of Beta(count, n - count + 1), float64 [B]; 0 where the count is 0.

    Args:
        counts: integers [B], successes.
        n: of so many trials.
        alpha: in (0, 1).
    """
    found = counts.double()
    quantiles = statistics().beta.ppf(alpha, found.clamp_min(1).numpy(), (n - found.clamp_min(1) + 1).numpy())
    return torch.where(found > 0, torch.as_tensor(quantiles, dtype=torch.float64, device="cpu"), 0.0)


def certified_radii(bounds: Tensor, sigma: float) -> Tensor:
    """The l2 radius sigma * Phi^-1(p) of each lower bound p in float64 [B] (theorem 1 with p_B = 1 - p_A); 0 below
    p = 1/2."""
    return sigma * torch.special.ndtri(bounds.double().clamp_min(0.5))


def differing(counts: Tensor, alpha: float) -> Tensor:
    """Whether the two-sided binomial test rejects at ``alpha`` that the first two classes of counts [B, classes] are
    equally probable: bool [B]."""
    test = statistics().binomtest
    pairs = counts.topk(2, dim=1).values.tolist()
    return torch.tensor(
        [first > 0 and test(first, first + second).pvalue <= alpha for first, second in pairs], device="cpu"
    )
