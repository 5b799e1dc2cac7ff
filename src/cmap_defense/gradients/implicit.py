"""The gradient of a minimum, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cmap_defense.cmap.implicit import ImplicitReport, LinearSolve, implicit_latents
from cmap_defense.common.settings import require_integer, require_number
from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.results import PurificationResult

__all__ = ["Implicit"]


class Implicit(GradientMode):
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
        on_report: called with an ``ImplicitReport`` in each backward pass.

    Attributes:
        last_report: the latest report of this object, or None.

    Raises:
        SettingsError: a value is out of its range.
    """

    def __init__(
        self,
        iterations: int = 20,
        tolerance: float = 1e-3,
        damping: float = 0.1,
        l1_smoothing: float = 0.05,
        on_report: Callable[[ImplicitReport], None] | None = None,
    ) -> None:
        self.solve = LinearSolve(
            iterations=require_integer("Implicit", "iterations", iterations, minimum=1),
            tolerance=require_number("Implicit", "tolerance", tolerance, minimum=0.0),
            damping=require_number("Implicit", "damping", damping, minimum=0.0),
            l1_smoothing=require_number("Implicit", "l1_smoothing", l1_smoothing, minimum=0.0),
        )
        self.on_report = on_report
        self.last_report: ImplicitReport | None = None

    def purify(self, purification: Purification) -> PurificationResult:
        if not purification.wants_gradient:
            return purification.run()
        problem = purification.problem(self)
        plain = problem.solve(purification.callback)
        objective = problem.objective
        with torch.autocast(problem.start.device.type, enabled=False):
            latents = implicit_latents(objective, problem.images, plain.latents, self.solve, self._report)
            generated = problem.generate(latents)
        assert plain.history is not None
        return problem.result(latents, generated, plain.history)

    def _report(self, report: ImplicitReport) -> None:
        self.last_report = report
        if self.on_report is not None:
            self.on_report(report)

    def __repr__(self) -> str:
        s = self.solve
        return (
            f"Implicit(iterations={s.iterations}, tolerance={s.tolerance}, damping={s.damping}, "
            f"l1_smoothing={s.l1_smoothing})"
        )
