"""The exact gradient through every step of a purification; of the latent loop, also through its last steps."""

from __future__ import annotations

import dataclasses

from cmap_defense.cmap.unroll import Backward
from cmap_defense.errors import GradientError
from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.results import PurificationResult


@dataclasses.dataclass(frozen=True)
class Unrolled(GradientMode, Backward):
    """Through every step of the purifier, exactly.

    A purifier that adds noise and denoises, in one step or many, is differentiated as it is: through each step, its
    guidance and its adaptive step sizes. With ``checkpoint`` the denoiser's graph is made again in the backward pass,
    step by step and chunk by chunk, so that memory is that of one chunk of one step, and one or two image-sized states
    for each step. The other arguments are for the latent loop alone. Of a chain, the gradients of its purifiers are
    composed.

    Of CMAP it goes through every Adam step (moments, bias correction), the generator with its clip, SSIM and L1. It is
    exact for the objective with L1 smoothed; the forward pass is the shipped loop, with L1 as it is. Without smoothing
    the exact derivative does not see the input through L1 at all, since the derivative of a sign is zero: it is correct
    almost everywhere, and blind.

    Where images stop early (``CMAPSettings.stop_decrease``, ``stop_agreement``) it goes through the iterations that
    each made, whose number is a constant of the derivative: that is exact almost everywhere, and does not see the jumps
    where an input moves its stop. ``last`` counts from each image's own end.

    A long latent loop is a chaotic map, and its exact derivative can be large and useless. ``last`` and ``max_growth``
    trade exactness for a direction that points somewhere.

    Cost of CMAP, for T differentiated steps: in the backward pass T products with second derivatives (each about two to
    three forward and backward passes of the backbone), and with ``checkpoint`` the T steps once more. Memory: the graph
    of one chunk of ``max_parallel`` latents, and four latent-sized states for about 2 sqrt(T) steps (T without
    ``checkpoint``).

    Args:
        last: T, the steps to go back through, from the end of the loop; None for all.
        checkpoint: compute states again in the backward pass instead of keeping them.
        l1_smoothing: d in sqrt(r^2 + d^2) - d in place of |r|, for residuals r of images in [-1, 1]; 0 is the blind
            exact derivative.
        max_growth: the longest that the gradient of a latent may become on its way back, relative to its length at the
            end of the loop; None for no bound, which is exact.

    Raises:
        SettingsError: a value is out of its range.
    """

    def without_latents(self) -> Unrolled:
        return Unrolled(checkpoint=self.checkpoint)

    def purify(self, purification: Purification) -> PurificationResult:
        if not purification.wants_gradient:
            return purification.run()
        if purification.differentiate is not None:
            result = purification.differentiate(self)
            if not result.images.requires_grad:
                raise GradientError(
                    "The purifier returned images that do not depend on its input for autograd, so that there is no "
                    "exact gradient. Leave out detach() and no_grad() in it, or give PurifiedClassifier(..., "
                    "gradient=StraightThrough()), which takes the purification as the identity. A step hook that "
                    "returns images cuts the gradient unless it is live."
                )
            return result
        return purification.problem(self).unrolled(
            self, callback=purification.callback, live=purification.live, live_at=purification.live_at
        )
