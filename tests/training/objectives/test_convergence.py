"""What each objective is a loss for: on Gaussian data a model that is linear in x comes to the exact function.

It starts from a wrong mean and three times the standard deviation.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from cmap_defense.backbones.karras import karras_levels
from cmap_defense.training.objectives import CD, CT, ECT, EDM, ICT, Objective
from training.gaussian import (
    MU,
    NOISE,
    GaussianConsistency,
    GaussianDenoiser,
    GaussianMixed,
    S,
    plain_heun,
    train_linear,
)

QUICK = 1e-300
"""mu_0 for which the target follows within a few steps; with 0.95 it lags behind by thousands."""


def distilled(**settings: Any) -> CD:
    return CD(**settings, teacher=GaussianDenoiser(), teacher_source={"name": "exact"})


def trained(objective: Objective, steps: int, batch: int) -> tuple[float, float]:
    """Mean and standard deviation that the model has after a training."""
    make = GaussianDenoiser if objective.kind == "denoiser" else GaussianConsistency
    model = train_linear(make(-0.2, 3 * S), objective, steps, rate=0.05, batch=batch)
    return model.mean.item(), model.std


@pytest.mark.parametrize(
    ("objective", "steps", "mean_error", "std_error"),
    [
        pytest.param(EDM(), 1000, 0.004, 0.004, id="edm"),
        pytest.param(ICT(), 600, 0.004, 0.006, id="ict"),
        pytest.param(ECT(halvings=10), 1000, 0.004, 0.004, id="ect"),
        pytest.param(CT(decay_start=QUICK, distance="l1"), 1000, 0.004, 0.02, id="ct l1"),
        pytest.param(distilled(levels=80), 400, 1e-4, 0.004, id="cd l2"),
        pytest.param(distilled(levels=80, distance="l1"), 400, 1e-4, 0.004, id="cd l1"),
        pytest.param(distilled(levels=80, distance="pseudo-huber"), 400, 1e-4, 0.004, id="cd pseudo-huber"),
    ],
)
def test_the_model_comes_to_the_exact_function(
    objective: Objective, steps: int, mean_error: float, std_error: float
) -> None:
    """Absolute and relative errors. Distillation sees no noise, and its error is that of the solver."""
    mean, std = trained(objective, steps, batch=512 if objective.name == "ct" else 256)
    assert mean == pytest.approx(MU, abs=mean_error)
    assert std == pytest.approx(S, rel=std_error)


def fixed_point(count: int, covariance: Callable[[float, float], float]) -> float:
    """The standard deviation at which training with squared distances on ``count`` levels comes to rest.

    With f(x, t) = mu + a(t) (x - mu), the expected gradient is the sum over pairs of levels of

        da(t)/d(ln std) (a(t) E[(x_t - mu)^2] - a(r) E[(x_t - mu) (x_r - mu)]),

    where E[(x_t - mu)^2] = s^2 + t^2. covariance: the other moment as a function of t and r.
    """
    levels, floor = karras_levels(count, NOISE), NOISE.sigma_min**2

    def pull(std: float) -> float:
        def shrink(t: float) -> float:
            return ((std**2 + floor) / (std**2 + t**2)) ** 0.5

        total = 0.0
        for r, t in itertools.pairwise(levels):
            change = std**2 * shrink(t) * (1 / (std**2 + floor) - 1 / (std**2 + t**2))
            total += change * (shrink(t) * (S**2 + t**2) - shrink(r) * covariance(t, r))
        return total

    low, high = 0.2 * S, 5 * S
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if pull(middle) > 0 else (middle, high)
    return low


def test_consistency_training_comes_to_the_fixed_point_of_its_levels() -> None:
    """Both noisy images share x and z: the moment is s^2 + t r. That is Euler's method, 1.3 % off at 201 levels."""
    expected = fixed_point(201, lambda t, r: S**2 + t * r)
    mean, std = trained(CT(decay_start=QUICK), 2000, batch=512)
    assert expected == pytest.approx(S, rel=0.0135)
    assert std == pytest.approx(expected, rel=0.004)
    assert mean == pytest.approx(MU, abs=0.003)


def test_consistency_training_comes_there_too_when_its_target_lags_behind() -> None:
    """By 15 steps at the end, with mu_0 = 0.5 and 21 levels; by more with fewer, so that it takes longer."""
    expected = fixed_point(21, lambda t, r: S**2 + t * r)
    objective = CT(levels_end=20, decay_start=0.5)
    assert objective.decay_at(1 - 1e-9) == pytest.approx(0.936, abs=0.001)
    mean, std = trained(objective, 4000, batch=512)
    assert expected == pytest.approx(S, rel=0.135)
    assert std == pytest.approx(expected, rel=0.006)
    assert mean == pytest.approx(MU, abs=0.003)


def test_easy_tuning_makes_a_consistency_function_of_a_denoiser() -> None:
    """It starts from the exact denoiser, which the first of its stages leaves alone."""
    denoiser = train_linear(GaussianMixed(), ECT(halvings=0), 300, rate=0.05)
    assert denoiser.weight.item() == pytest.approx(0.0, abs=0.02)
    tuned = train_linear(GaussianMixed(), ECT(halvings=10), 1000, rate=0.05)
    assert tuned.weight.item() == pytest.approx(1.0, abs=0.02)
    assert tuned.mean.item() == pytest.approx(MU, abs=0.004)
    assert tuned.std == pytest.approx(S, rel=0.01)


def test_distillation_comes_to_the_fixed_point_of_its_levels() -> None:
    """The teacher's step is linear in x - mu; here the target is a running average."""
    expected = fixed_point(40, lambda t, r: (plain_heun(MU + 1, t, r) - MU) * (S**2 + t**2))
    mean, std = trained(distilled(levels=40, target_decay=0.5), 600, batch=256)
    assert expected == pytest.approx(S, rel=0.0125)
    assert std == pytest.approx(expected, rel=5e-4)
    assert mean == pytest.approx(MU, abs=1e-4)


@pytest.mark.parametrize(
    ("covariance", "order"),
    [
        pytest.param(lambda t, r: S**2 + t * r, 1, id="training"),
        pytest.param(lambda t, r: (plain_heun(MU + 1, t, r) - MU) * (S**2 + t**2), 2, id="distillation"),
    ],
)
def test_the_fixed_points_close_in_on_the_exact_function(
    covariance: Callable[[float, float], float], order: int
) -> None:
    errors = [abs(fixed_point(count, covariance) / S - 1) for count in (101, 201, 401)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert ratios == pytest.approx([2.0**order] * 2, rel=0.05)
