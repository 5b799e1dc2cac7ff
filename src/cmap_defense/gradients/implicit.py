"""The gradient of a minimum, by the implicit function theorem."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from cmap_defense.cmap.implicit import ImplicitReport, LinearSolve, implicit_latents
from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.results import PurificationResult


@dataclasses.dataclass(frozen=True)
class Implicit(GradientMode, LinearSolve):
    """As if the latents found were a minimum of the smoothed objective; wrong to the degree that they are not.

    The linear system is solved by damped conjugate gradients; how well is reported, never hidden.

    Cost: the plain loop, and in the backward pass up to ``iterations`` products with second derivatives (each about
    two to three forward and backward passes of the backbone). Memory: the graph of one chunk of ``max_parallel``
    latents.

    Args:
        iterations: of conjugate gradients, at most.
        tolerance: of the residual, relative to the right-hand side, at which it stops.
        damping: added to the second derivatives, relative to their size along the right-hand side. The loop ends before
            a minimum, where they are not positive.
        l1_smoothing: d of L1, as for ``Unrolled``; 0 leaves SSIM and the latent
            term alone in the second derivatives.

    Attributes:
        last_report: the latest report of this object, or None.

    Raises:
        SettingsError: a value is out of its range.
    """

    last_report: ClassVar[ImplicitReport | None] = None
    needs_latents = True

    def purify(self, purification: Purification) -> PurificationResult:
        if not purification.wants_gradient:
            return purification.run()
        problem = purification.problem(self)
        plain = problem.solve(purification.callback)
        objective = problem.objective
        with torch.autocast(problem.start.device.type, enabled=False):
            latents = implicit_latents(objective, problem.images, plain.latents, self, self._report)
            generated = problem.generate(latents)
        assert plain.history is not None
        return problem.result(latents, generated, plain.history)

    def _report(self, report: ImplicitReport) -> None:
        object.__setattr__(self, "last_report", report)
