"""The exact gradient through the latent loop, or through its last steps."""

from __future__ import annotations

import torch

from cmap_defense.cmap.optimise import history_of
from cmap_defense.cmap.unroll import Backward, unrolled_latents
from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.results import PurificationResult
from cmap_defense.settings import require_integer, require_number

__all__ = ["Unrolled"]


class Unrolled(GradientMode):
    """Through every Adam step (moments, bias correction), the generator with its clip, SSIM and L1.

    A purifier that is no optimisation over latents is differentiated as it is, exactly; the arguments below are then of
    no matter.

    Of CMAP it is exact for the objective with L1 smoothed; the forward pass is the shipped loop, with L1 as it is.
    Without smoothing the exact derivative does not see the input through L1 at all, since the derivative of a sign is
    zero: it is correct almost everywhere, and blind.

    A long loop is a chaotic map, and its exact derivative can be large and useless. ``last`` and ``max_growth`` trade
    exactness for a direction that points somewhere.

    Cost, for T differentiated steps: in the backward pass T products with second derivatives (each about two to three
    forward and backward passes of the backbone), and with ``checkpoint`` the T steps once more. Memory: the graph of
    one chunk of ``max_parallel`` latents, and four latent-sized states for about 2 sqrt(T) steps (T without
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

    def __init__(
        self,
        last: int | None = None,
        checkpoint: bool = True,
        l1_smoothing: float = 0.05,
        max_growth: float | None = None,
    ) -> None:
        self.last = None if last is None else require_integer("Unrolled", "last", last, minimum=1)
        self.backward = Backward(
            l1_smoothing=require_number("Unrolled", "l1_smoothing", l1_smoothing, minimum=0.0),
            checkpoint=bool(checkpoint),
            max_growth=None if max_growth is None else require_number("Unrolled", "max_growth", max_growth, above=0.0),
        )

    def purify(self, purification: Purification) -> PurificationResult:
        if not purification.wants_gradient:
            return purification.run()
        if purification.differentiate is not None:
            return purification.differentiate()
        problem = purification.problem(self)
        objective, rows = problem.objective, []
        with torch.autocast(problem.start.device.type, enabled=False):
            latents = unrolled_latents(
                objective,
                problem.images,
                problem.start,
                last=self.last,
                backward=self.backward,
                callback=purification.callback,
                live=purification.live,
                live_at=purification.live_at,
                rows=rows,
            )
            generated = problem.generate(latents)
            return problem.result(latents, generated, history_of(rows, latents.detach()))

    def __repr__(self) -> str:
        values = {"last": self.last, "checkpoint": self.backward.checkpoint}
        values |= {"l1_smoothing": self.backward.l1_smoothing, "max_growth": self.backward.max_growth}
        return f"Unrolled({', '.join(f'{name}={value}' for name, value in values.items())})"
