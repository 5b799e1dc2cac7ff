"""Consistency distillation: the teacher's Heun step, the loss, the settings."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cmap_defense.training.objectives import CD, Batch, heun_step
from cmap_defense.training.objectives.base import consistency_loss
from cmap_defense.training.objectives.distances import squared_l2
from toys import noise
from training.gaussian import (
    MU,
    NOISE,
    GaussianConsistency,
    GaussianDenoiser,
    S,
    at_levels,
    gaussian_images,
    plain_consistency,
    plain_heun,
    plain_noisy,
    plain_squares,
)

IMAGES, Z = noise(3, 2, 4, 5, seed=4, dtype=torch.float64), noise(3, 2, 4, 5, seed=5, dtype=torch.float64)
T, R = torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64), torch.tensor([0.4, 1.0, 14.0], dtype=torch.float64)


def flow(x: Tensor, t: float, r: float) -> Tensor:
    """The probability flow itself, from level t to r."""
    return MU + (x - MU) * math.sqrt((S**2 + r**2) / (S**2 + t**2))


def test_the_step_is_its_formula() -> None:
    noisy = plain_noisy(IMAGES, Z, T)
    expected = [[plain_heun(x, t, r) for x in xs] for xs, t, r in zip(noisy, T.tolist(), R.tolist(), strict=True)]
    found = heun_step(GaussianDenoiser(), torch.tensor(noisy, dtype=torch.float64).view_as(IMAGES), T, R)
    torch.testing.assert_close(found.flatten(1).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_the_error_of_one_step_falls_with_its_third_power() -> None:
    x, denoiser = noise(2, 1, 2, 3, seed=1, dtype=torch.float64), GaussianDenoiser()

    def error(h: float) -> float:
        t, r = (torch.full((2,), level, dtype=torch.float64) for level in (1.0, 1.0 - h))
        return (heun_step(denoiser, x, t, r) - flow(x, 1.0, 1.0 - h)).abs().max().item()

    orders = [math.log2(a / b) for a, b in itertools.pairwise(error(0.1 / 2**k) for k in range(6))]
    assert orders[-1] == pytest.approx(3.0, abs=0.03)
    assert all(abs(b - 3) < abs(a - 3) for a, b in itertools.pairwise(orders))


def test_the_error_of_a_whole_trajectory_falls_with_the_square_of_the_step() -> None:
    x, denoiser = noise(2, 1, 2, 3, seed=1, dtype=torch.float64), GaussianDenoiser()

    def error(count: int) -> float:
        levels = torch.linspace(3.0, 0.1, count + 1, dtype=torch.float64)
        y = x
        for t, r in itertools.pairwise(levels):
            y = heun_step(denoiser, y, t.expand(2), r.expand(2))
        return (y - flow(x, 3.0, 0.1)).abs().max().item()

    assert math.log2(error(200) / error(400)) == pytest.approx(2.0, abs=0.03)


def test_the_teacher_is_called_at_both_levels() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def teacher(noisy: Tensor, sigma: Tensor) -> Tensor:
        calls.append((noisy, sigma))
        return torch.zeros_like(noisy)

    x = noise(3, 1, 2, 3, seed=1, dtype=torch.float64)
    heun_step(teacher, x, T, R)
    assert [sigma.tolist() for _, sigma in calls] == [T.tolist(), R.tolist()]
    torch.testing.assert_close(calls[1][0], x * (R / T)[:, None, None, None])  # Euler's step towards zero


def test_the_loss_is_its_formula() -> None:
    noisy = plain_noisy(IMAGES, Z, T)
    stepped = [[plain_heun(x, t, r) for x in xs] for xs, t, r in zip(noisy, T.tolist(), R.tolist(), strict=True)]
    expected = plain_squares(at_levels(plain_consistency, noisy, T), at_levels(plain_consistency, stepped, R))
    model = GaussianConsistency()
    found = consistency_loss(model, model, IMAGES, Z, T, R, distance=squared_l2, teacher=GaussianDenoiser())
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_gradient_reaches_neither_target_nor_teacher() -> None:
    model, target, teacher = GaussianConsistency(0.1, 0.7), GaussianConsistency(-0.4, 0.2), GaussianDenoiser()
    losses = consistency_loss(model, target, IMAGES, Z, T, R, distance=squared_l2, teacher=teacher)
    losses.sum().backward()
    assert model.mean.grad is not None
    assert target.mean.grad is None
    assert teacher.mean.grad is None
    level = (slice(None), None, None, None)
    noisy = IMAGES + T[level] * Z
    expected = squared_l2(model(noisy, T), target(heun_step(teacher, noisy, T, R), R))
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("class_conditional", [True, False])
def test_a_class_conditional_teacher_gets_the_classes_of_the_images(class_conditional: bool) -> None:
    given: list[dict[str, Any]] = []

    def teacher(noisy: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        given.append(options)
        return torch.zeros_like(noisy)

    labels, uniform = torch.tensor([4, 0, 2]), torch.full((3,), 0.5, dtype=torch.float64)
    made = CD(teacher=teacher, teacher_source={"name": "x"}, class_conditional=class_conditional)
    model = GaussianConsistency()
    made.losses(model, Batch(IMAGES, Z, uniform, 0.0, labels), NOISE, model)
    assert given == [{"class_labels": labels} if class_conditional else {}] * 2


def test_the_loss_vanishes_at_the_exact_consistency_function_but_for_the_solvers_error() -> None:
    """Squares of errors of the third order fall with the sixth power of the number of levels."""
    exact, teacher, images = GaussianConsistency(), GaussianDenoiser(), gaussian_images(500, 3).double()
    z = noise(500, 1, 2, 3, seed=4, dtype=torch.float64)
    uniform = (torch.arange(500, dtype=torch.float64) + 0.5) / 500

    def loss(levels: int) -> float:
        objective = CD(levels=levels, teacher=teacher, teacher_source={"name": "exact"})
        return objective.losses(exact, Batch(images, z, uniform, 0.0), NOISE, exact).mean().item()

    assert loss(18) < 0.02
    assert math.log2(loss(41) / loss(81)) == pytest.approx(6.0, abs=0.5)


def made(**settings: Any) -> CD:
    return CD(**settings, teacher=GaussianDenoiser(), teacher_source={"name": "edm-cifar10"})


def test_the_description_names_the_teacher() -> None:
    described = made(levels=40).describe()
    assert described["name"] == "cd"
    assert described["teacher"] == "edm-cifar10"
    assert described["levels"] == 40
