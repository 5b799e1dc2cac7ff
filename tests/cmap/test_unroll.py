"""The gradient through the loop and that of an optimum, against finite differences in float64."""

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from cmap_defense.cmap import unroll
from cmap_defense.cmap.implicit import ImplicitReport, LinearSolve, implicit_latents
from cmap_defense.cmap.objective import LatentObjective
from cmap_defense.cmap.optimise import Callback, LatentState, optimise_latents
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.unroll import Backward, generate_with_gradient, unrolled_latents
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
B, K = 2, 3
DOUBLE = torch.float64
GENERATOR = ToyBackbone(SHAPE).double().requires_grad_(False)
START = noise(B, K, *SHAPE, seed=3, dtype=DOUBLE)
IMAGES = uniform(B, *SHAPE, seed=5, dtype=DOUBLE)
WEIGHTS = noise(B, K, *SHAPE, seed=9, dtype=DOUBLE)
DIRECTION = noise(B, *SHAPE, seed=11, dtype=DOUBLE)


def settings_of(iterations: int, smoothing: float = 0.05, **changes: Any) -> CMAPSettings:
    values = {"n_latents": K, "iterations": iterations, "learning_rate": 0.05, "l1_smoothing": smoothing}
    return CMAPSettings(**(values | changes))


def score(
    images: Tensor,
    settings: CMAPSettings,
    *,
    last: int | None = None,
    chunk: int | None = None,
    callback: Callback | None = None,
    **backward: object,
) -> Tensor:
    """A number that depends on the images through the whole purification."""
    objective = LatentObjective(GENERATOR.generate, images, K, settings, max_parallel=chunk)
    latents = unrolled_latents(
        objective,
        images,
        START,
        backward=Backward(last=last, **backward),  # pyright: ignore[reportArgumentType]
        callback=callback,
    )
    return (generate_with_gradient(objective, latents, images) * WEIGHTS).sum()


def slope(images: Tensor, settings: CMAPSettings, **options: object) -> float:
    """The derivative along DIRECTION, by backward."""
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf, settings, **options), leaf)  # pyright: ignore[reportArgumentType]
    return (gradient * DIRECTION).sum().item()


def difference(settings: CMAPSettings, h: float, **options: object) -> float:
    """The derivative along DIRECTION, by central differences."""
    with torch.no_grad():
        ends = [score(IMAGES + sign * h * DIRECTION, settings, **options).item() for sign in (1, -1)]  # pyright: ignore[reportArgumentType]
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("iterations", [1, 2, 7, 16, 30])
@pytest.mark.parametrize("options", [{}, {"checkpoint": False}, {"chunk": 4}, {"chunk": 1, "checkpoint": False}])
def test_gradient_through_all_steps_is_that_of_finite_differences(iterations: int, options: dict):
    settings = settings_of(iterations)
    assert slope(IMAGES, settings, **options) == pytest.approx(difference(settings, 1e-6), rel=1e-6)


def test_adams_own_moments_and_weights_other_than_the_defaults_are_part_of_it():
    settings = settings_of(12, betas=(0.5, 0.8), eps=0.3, ssim_weight=7.0, latent_weight=0.4, schedule="cosine")
    assert slope(IMAGES, settings) == pytest.approx(difference(settings, 1e-6), rel=1e-6)


def test_one_latent_has_no_deviation_and_still_an_exact_gradient():
    settings = settings_of(9).replace(n_latents=1)
    start = START[:, :1]

    def value(images: Tensor) -> Tensor:
        objective = LatentObjective(GENERATOR.generate, images, 1, settings)
        latents = unrolled_latents(objective, images, start, backward=Backward())
        return (generate_with_gradient(objective, latents, images) * WEIGHTS[:, :1]).sum()

    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        ends = [value(IMAGES + sign * 1e-6 * DIRECTION).item() for sign in (1, -1)]
    assert (gradient * DIRECTION).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_the_last_steps_alone_are_the_loop_from_the_state_before_them():
    """Truncation holds the state before the last T steps constant: so do differences with the images changed there."""
    settings, last = settings_of(11), 4

    def value(images: Tensor) -> Tensor:
        early = LatentObjective(GENERATOR.generate, IMAGES, K, settings)
        late = LatentObjective(GENERATOR.generate, images, K, settings)
        switched = _Switching(early, late, settings.iterations - last)
        latents = unrolled_latents(switched, images, START, backward=Backward(last=last))  # pyright: ignore[reportArgumentType]
        return (generate_with_gradient(late, latents, images) * WEIGHTS).sum()

    with torch.no_grad():
        ends = [value(IMAGES + sign * 1e-6 * DIRECTION).item() for sign in (1, -1)]
    exact = (ends[0] - ends[1]) / 2e-6
    assert slope(IMAGES, settings, last=last) == pytest.approx(exact, rel=1e-6)
    assert slope(IMAGES, settings) != pytest.approx(exact, rel=1e-2)


class _Switching:
    """One objective for the first evaluations, another for the rest."""

    def __init__(self, early: LatentObjective, late: LatentObjective, count: int) -> None:
        self.early, self.late, self.count = early, late, count
        self.settings, self.images = late.settings, late.images

    def gradient(self, latents: Tensor, *, keep_images: bool = False):
        self.count -= 1
        return (self.early if self.count >= 0 else self.late).gradient(latents, keep_images=keep_images)


def test_without_smoothing_the_gradient_is_blind_to_l1():
    """The trap: with L1 and the latent term alone the exact derivative is zero, while the latents do move."""
    settings = settings_of(6, smoothing=0.0, ssim_weight=0.0)
    assert slope(IMAGES, settings, l1_smoothing=0.0) == 0.0
    assert difference(settings, 1e-2) != 0.0
    assert slope(IMAGES, settings, l1_smoothing=0.05) != 0.0


@pytest.mark.parametrize("images", [IMAGES, torch.zeros_like(IMAGES), torch.ones_like(IMAGES)])
def test_gradient_is_finite_also_where_latents_agree_and_images_are_flat(images: Tensor):
    """Equal latents have no deviation, a root at 0; the moments of Adam start at 0, another one."""
    settings = settings_of(5)
    leaf = images.clone().requires_grad_()
    objective = LatentObjective(GENERATOR.generate, leaf, K, settings)
    equal = torch.zeros_like(START)
    latents = unrolled_latents(objective, leaf, equal, backward=Backward())
    (gradient,) = torch.autograd.grad((latents * WEIGHTS).sum(), leaf)
    assert torch.isfinite(gradient).all()


def test_values_are_those_of_the_plain_loop_to_the_bit():
    settings = settings_of(9, smoothing=0.0)
    found, _ = optimise_latents(GENERATOR.generate, IMAGES, START, settings)
    leaf = IMAGES.clone().requires_grad_()
    for checkpoint in (True, False):
        objective = LatentObjective(GENERATOR.generate, leaf, K, settings)
        latents = unrolled_latents(objective, leaf, START, backward=Backward(last=5, checkpoint=checkpoint))
        assert torch.equal(latents, found)


def test_callback_is_called_once_an_iteration_and_never_again_on_the_way_back():
    seen: list[int] = []
    settings = settings_of(10)
    leaf = IMAGES.clone().requires_grad_()
    value = score(leaf, settings, callback=lambda state: seen.append(state.iteration))
    value.backward()
    assert seen == list(range(10))


def test_replaced_latents_are_constants_and_are_not_asked_for_again():
    settings, calls = settings_of(8), []

    def replace(state: LatentState) -> Tensor | None:
        calls.append(state.iteration)
        return 0.5 * START if state.iteration == 5 else None

    gradient = slope(IMAGES, settings, callback=replace)
    assert calls == list(range(8))
    assert gradient == pytest.approx(difference(settings, 1e-6, callback=replace), rel=1e-5)


@pytest.mark.parametrize("iterations", [9, 64])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_states_kept_at_once_grow_like_the_square_root(
    monkeypatch: pytest.MonkeyPatch, iterations: int, checkpoint: bool
):
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    most = 0

    class Watched(unroll._Visited):
        def __init__(self, *values: object) -> None:
            nonlocal most
            super().__init__(*values)  # pyright: ignore[reportArgumentType]
            alive.add(self)
            most = max(most, len(alive))

        __hash__ = object.__hash__

    monkeypatch.setattr(unroll, "_Visited", Watched)
    slope(IMAGES, settings_of(iterations), checkpoint=checkpoint)
    assert most == (math.isqrt(iterations) if checkpoint else iterations)


def test_bounded_growth_changes_only_what_grew():
    settings = settings_of(20)
    exact = slope(IMAGES, settings)
    assert slope(IMAGES, settings, max_growth=1e9) == pytest.approx(exact, rel=1e-12)
    assert slope(IMAGES, settings, max_growth=0.1) != pytest.approx(exact, rel=1e-3)


def test_batch_of_images_is_each_image_alone():
    settings = settings_of(6)
    leaf = IMAGES.clone().requires_grad_()
    (whole,) = torch.autograd.grad(score(leaf, settings), leaf)
    for b in range(B):
        alone = IMAGES[b : b + 1].clone().requires_grad_()
        objective = LatentObjective(GENERATOR.generate, alone, K, settings)
        latents = unrolled_latents(objective, alone, START[b : b + 1], backward=Backward())
        images = generate_with_gradient(objective, latents, alone)
        (gradient,) = torch.autograd.grad((images * WEIGHTS[b : b + 1]).sum(), alone)
        torch.testing.assert_close(gradient[0], whole[b], rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- an optimum


def minimum(images: Tensor, start: Tensor, settings: CMAPSettings) -> tuple[Tensor, LatentObjective]:
    """Latents at which the gradient is below 1e-10: L-BFGS, and Newton steps with conjugate gradients behind it."""
    objective = LatentObjective(GENERATOR.generate, images, K, settings)
    latents = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [latents],
        max_iter=3000,
        tolerance_grad=1e-9,
        tolerance_change=0,
        history_size=40,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        terms, gradient, _ = objective.gradient(latents.detach())
        latents.grad = gradient
        return (K * terms.total).sum()

    search.step(evaluate)  # pyright: ignore[reportArgumentType]
    found = latents.detach()
    for _ in range(4):
        found = found - newton_direction(objective, found)
    assert objective.gradient(found)[1].flatten(1).norm(dim=1).max() < 1e-10
    return found, objective


def newton_direction(objective: LatentObjective, at: Tensor) -> Tensor:
    """H^-1 g by plain conjugate gradients, for one block of all latents."""
    right = objective.gradient(at)[1]
    solution, residual = torch.zeros_like(right), right.clone()
    direction = residual.clone()
    for _ in range(400):
        image, _ = objective.products(at, direction, l1_smoothing=0.05, mixed=False)
        step = residual.square().sum() / (direction * image).sum()
        solution, after = solution + step * direction, residual - step * image
        if after.norm() < 1e-15:
            break
        direction, residual = after + after.square().sum() / residual.square().sum() * direction, after
    return solution


def test_gradient_of_an_optimum_is_that_of_finite_differences_between_optima():
    settings = settings_of(1)
    found, objective = minimum(IMAGES, START, settings)
    reports: list[ImplicitReport] = []
    leaf = IMAGES.clone().requires_grad_()
    solve = LinearSolve(iterations=500, tolerance=1e-12, damping=0.0)
    latents = implicit_latents(objective, leaf, found, solve, reports.append)
    assert torch.equal(latents, found)
    (gradient,) = torch.autograd.grad((GENERATOR.generate(latents.flatten(0, 1)) * WEIGHTS.flatten(0, 1)).sum(), leaf)
    values = []
    for sign in (1, -1):
        moved, _ = minimum(IMAGES + sign * 1e-5 * DIRECTION, found, settings)
        values.append((GENERATOR.generate(moved.flatten(0, 1)) * WEIGHTS.flatten(0, 1)).sum().item())
    assert (gradient * DIRECTION).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)
    assert len(reports) == 1
    assert reports[0].residual.max() < 1e-11
    assert not reports[0].negative_curvature.any()


def test_residual_that_is_reported_is_that_of_the_damped_system():
    settings = settings_of(1)
    objective = LatentObjective(GENERATOR.generate, IMAGES, K, settings)
    reports: list[ImplicitReport] = []
    leaf = IMAGES.clone().requires_grad_()
    solve = LinearSolve(iterations=3, tolerance=0.0, damping=30.0)
    latents = implicit_latents(objective, leaf, START, solve, reports.append)
    (latents * WEIGHTS).sum().backward()
    (report,) = reports
    assert report.iterations == 3
    assert ((report.residual > 0) & (report.residual < 1)).all()
    along, _ = objective.products(START, WEIGHTS, l1_smoothing=0.05)
    rayleigh = (along * WEIGHTS).flatten(1).sum(1).abs() / WEIGHTS.square().flatten(1).sum(1)
    torch.testing.assert_close(report.damping, 30 * rayleigh)


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_products_are_differences_of_gradients(tolerance: float):
    settings = settings_of(1, tolerance=tolerance)
    objective = LatentObjective(GENERATOR.generate, IMAGES, K, settings, max_parallel=4)
    h = 1e-6
    product, mixed = objective.products(START, WEIGHTS, l1_smoothing=0.0)
    up, down = (objective.gradient(START + sign * h * WEIGHTS)[1] for sign in (1, -1))
    torch.testing.assert_close(product, (up - down) / (2 * h), rtol=1e-6, atol=1e-6)
    moved = [
        LatentObjective(GENERATOR.generate, IMAGES + sign * h * DIRECTION, K, settings).gradient(START)[1]
        for sign in (1, -1)
    ]
    expected = ((moved[0] - moved[1]) / (2 * h) * WEIGHTS).sum()
    torch.testing.assert_close((mixed * DIRECTION).sum(), expected, rtol=1e-6, atol=1e-6)


def test_where_the_loop_has_not_arrived_the_report_says_so():
    """Away from a minimum the second derivatives are not positive; the search ends there and nothing is hidden."""
    objective = LatentObjective(GENERATOR.generate, IMAGES, K, settings_of(1))
    reports: list[ImplicitReport] = []
    leaf = IMAGES.clone().requires_grad_()
    latents = implicit_latents(objective, leaf, START, LinearSolve(damping=0.0), reports.append)
    (latents * WEIGHTS).sum().backward()
    assert reports[0].negative_curvature.all()
    assert torch.isfinite(leaf.grad).all()  # pyright: ignore[reportArgumentType]
    assert leaf.grad.abs().sum() > 0  # pyright: ignore[reportOptionalMemberAccess]
