"""BPDA: the purification as the identity."""

from __future__ import annotations

import dataclasses

from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.results import PurificationResult


class StraightThrough(GradientMode):
    """Backward pass differentiable approximation (BPDA; Athalye et al. 2018, arXiv 1802.00420, section 4.1.1).

    The derivative of the purification is taken as the identity, for each of the K images; through the log mean
    probability the input receives their weighted average.

    Cost: one backward pass of the classifier, none of the backbone. Not the gradient of anything: an approximation.
    """

    def purify(self, purification: Purification) -> PurificationResult:
        result = purification.run()
        if not purification.wants_gradient:
            return result
        carrier = purification.images[:, None]
        return dataclasses.replace(result, images=result.images + (carrier - carrier.detach()).to(result.images.dtype))
