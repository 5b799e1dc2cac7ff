"""The gradient of an optimum with respect to what was optimised for: the implicit function theorem.

At a minimum u* of K L(u, x) its gradient is zero for every x, so du*/dx = -H^-1 d^2(K L)/du dx with H = d^2(K L)/du du.
For a cotangent c of u* that is -(d^2(K L)/du dx)^T w with H w = c, and w is found by conjugate gradients (Hestenes and
Stiefel 1952), image by image, from products H p alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmap_defense.cmap.objective import LatentObjective
from cmap_defense.common.settings import setting


@dataclasses.dataclass(frozen=True)
class LinearSolve:
    """How H w = c is solved.

    Attributes:
        iterations: products with H at most.
        tolerance: of the residual, relative to |c|.
        damping: (H + lambda) w = c is solved instead, with lambda this many times |c^T H c| / |c|^2; H is not positive
            where the loop has not arrived at a minimum.
        l1_smoothing: d of L1 in the second derivatives.
    """

    iterations: int = setting(20, minimum=1)
    tolerance: float = setting(1e-3, minimum=0.0)
    damping: float = setting(0.1, minimum=0.0)
    l1_smoothing: float = setting(0.05, minimum=0.0)


@dataclasses.dataclass(frozen=True)
class ImplicitReport:
    """How a backward pass went, per image.

    Attributes:
        residual: [B], |(H + lambda) w - c| / |c| at the end.
        damping: [B], the lambda used.
        negative_curvature: [B], whether a direction was met in which H + lambda is not positive; there the search
            ended.
        iterations: products with H that it took.
    """

    residual: Tensor
    damping: Tensor
    negative_curvature: Tensor
    iterations: int


def implicit_latents(
    objective: LatentObjective,
    images: Tensor,
    found: Tensor,
    solve: LinearSolve,
    report: Callable[[ImplicitReport], None] | None = None,
) -> Tensor:
    """``found`` [B, K, C, H, W] as a function of the images, differentiable once.

    Args:
        objective: of the images.
        images: [B, C, H, W] in [0, 1], those of the objective, with their graph.
        found: the latents; the derivative is that of a minimum, which they should be.
        solve: how the linear system is solved.
        report: called once in each backward pass.
    """
    return _Implicit.apply(images, found.detach(), (objective, solve, report))


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, found: Tensor, plan: Any) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(found)
        return found.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        objective, solve, report = ctx.plan
        (found,) = ctx.saved_tensors
        with torch.autocast(found.device.type, enabled=False):
            solution, outcome = _conjugate_gradients(objective, found, cotangents[0], solve)
            if report is not None:
                report(outcome)
            _, mixed = objective.products(found, solution, l1_smoothing=solve.l1_smoothing)
        return -mixed, None, None


def _conjugate_gradients(
    objective: LatentObjective, at: Tensor, right: Tensor, solve: LinearSolve
) -> tuple[Tensor, ImplicitReport]:
    """w with (H + lambda) w = right for each image, as well as the iterations allow."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(dim=1)

    def wide(scale: Tensor) -> Tensor:
        return scale[:, None, None, None, None]

    def product(direction: Tensor) -> Tensor:
        return objective.products(at, direction, l1_smoothing=solve.l1_smoothing, mixed=False)[0]

    tiny = torch.finfo(right.dtype).tiny
    square = dot(right, right)
    active = square > 0
    negative = torch.zeros_like(active)
    solution, residual, direction = torch.zeros_like(right), right.clone(), right.clone()
    damping, length, taken = torch.zeros_like(square), square, 0
    for taken in range(1, solve.iterations + 1):
        image = product(direction)
        if taken == 1:  # the first direction is the right-hand side itself
            damping = solve.damping * dot(right, image).abs() / square.clamp_min(tiny)
        image = image + wide(damping) * direction
        curvature = dot(direction, image)
        negative |= active & (curvature <= 0)
        active &= curvature > 0
        step = torch.where(active, length / curvature.clamp_min(tiny), 0)
        solution = solution + wide(step) * direction
        residual = residual - wide(step) * image
        now = dot(residual, residual)
        direction = residual + wide(now / length.clamp_min(tiny)) * direction
        length = torch.where(active, now, length)
        active &= now > solve.tolerance**2 * square
        if not bool(active.any()):
            break
    if bool(negative.any()):  # where no step could be taken at all, w is along the right-hand side
        unsolved = negative & (dot(solution, solution) == 0)
        scale = 1 / (dot(right, product(right)).abs() / square.clamp_min(tiny) + damping).clamp_min(tiny)
        solution = torch.where(wide(unsolved), wide(scale) * right, solution)
    left = dot(residual, residual).sqrt() / square.sqrt().clamp_min(tiny)
    return solution, ImplicitReport(left, damping, negative, taken)
