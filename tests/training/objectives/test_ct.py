"""Consistency training as first published: its two schedules, its pair of levels, its loss."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.training.objectives import CT
from cmap_defense.training.objectives.base import consistency_loss
from cmap_defense.training.objectives.distances import Distance, l1, squared_l2
from toys import noise
from training.gaussian import (
    GaussianConsistency,
    at_levels,
    gaussian_images,
    plain_consistency,
    plain_noisy,
    plain_squares,
)

LAST = math.nextafter(1.0, 0.0)
SCHEDULES = st.builds(
    lambda start, more, mu: CT(levels_start=start, levels_end=start + more, decay_start=mu),
    st.integers(2, 40),
    st.integers(0, 300),
    st.floats(0.01, 0.999),
)


@pytest.mark.parametrize(
    ("progress", "count"), [(0.0, 2), (0.0001, 3), (0.25, 101), (0.5, 143), (0.9, 191), (LAST, 201)]
)
def test_the_number_of_levels_by_hand(progress: float, count: int) -> None:
    """sqrt(0.0001 x 40397 + 4) = 2.8, sqrt(0.25 x 40397 + 4) = 100.5, sqrt(0.5 x 40397 + 4) = 142.1, and so on."""
    assert CT().level_count(progress) == count


@given(settings=SCHEDULES, first=st.floats(0, LAST), second=st.floats(0, LAST))
def test_the_number_of_levels_rises_between_its_bounds(settings: CT, first: float, second: float) -> None:
    low, high = sorted((first, second))
    start, end = settings.levels_start, settings.levels_end + 1
    assert start <= settings.level_count(low) <= settings.level_count(high) <= end
    assert settings.level_count(0.0) == start
    assert settings.level_count(LAST) == end


def test_the_decay_by_hand() -> None:
    """mu_0 at first; 0.95^(2/201) = 0.99949 at last."""
    assert CT().decay_at(0.0) == pytest.approx(0.95, rel=1e-15)
    assert CT().decay_at(LAST) == pytest.approx(0.95 ** (2 / 201), rel=1e-12)
    assert CT(decay_start=0.9).decay_at(0.25) == pytest.approx(0.9 ** (2 / 101), rel=1e-12)


@given(settings=SCHEDULES, first=st.floats(0, LAST), second=st.floats(0, LAST))
def test_the_decay_rises_from_its_start_and_stays_below_one(settings: CT, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert settings.decay_at(0.0) == pytest.approx(settings.decay_start, rel=1e-12)
    assert settings.decay_at(low) <= settings.decay_at(high) < 1


def plain_l1(a: list[list[float]], b: list[list[float]]) -> list[float]:
    return [math.fsum(abs(p - q) for p, q in zip(x, y, strict=True)) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(("distance", "plain"), [(squared_l2, plain_squares), (l1, plain_l1)])
def test_the_loss_is_its_formula(distance: Distance, plain: Any) -> None:
    images, z = noise(3, 2, 4, 5, seed=4, dtype=torch.float64), noise(3, 2, 4, 5, seed=5, dtype=torch.float64)
    t = torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64)
    r = torch.tensor([0.4, 1.0, 0.002], dtype=torch.float64)
    model = GaussianConsistency()
    ahead = at_levels(plain_consistency, plain_noisy(images, z, t), t)
    behind = at_levels(plain_consistency, plain_noisy(images, z, r), r)
    found = consistency_loss(model, model, images, z, t, r, distance=distance)
    assert found.tolist() == pytest.approx(plain(ahead, behind), rel=1e-12)


def test_the_target_gives_the_values_and_no_gradient() -> None:
    images, z = gaussian_images(3, 1), noise(3, 1, 2, 3, seed=2)
    t, r = torch.tensor([0.5, 3.0, 20.0]), torch.tensor([0.4, 1.0, 0.002])
    model, target = GaussianConsistency(0.1, 0.7), GaussianConsistency(-0.4, 0.2)
    losses = consistency_loss(model, target, images, z, t, r, distance=squared_l2)
    losses.sum().backward()
    assert model.mean.grad is not None
    assert target.mean.grad is None
    level = (slice(None), None, None, None)
    expected = (model(images + t[level] * z, t) - target(images + r[level] * z, r)).square().flatten(1).sum(dim=1)
    torch.testing.assert_close(losses, expected)
