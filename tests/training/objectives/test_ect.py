"""Easy consistency tuning: its stages, its pair of noise levels, and what the loss vanishes for."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.training.objectives import ECT, Batch
from cmap_defense.training.objectives.ict import ict_loss
from toys import noise
from training.gaussian import MU, NOISE, GaussianConsistency, S, drawn, gaussian_images

LEVELS = torch.logspace(math.log10(NOISE.sigma_min * 1.001), math.log10(NOISE.sigma_max), 200)


@pytest.mark.parametrize("stage", range(9))
def test_the_lower_level_lies_below_and_inside_the_range(stage: int) -> None:
    r = ECT().previous_level(LEVELS, stage, NOISE.sigma_min)
    assert (r < LEVELS).all()
    assert (r >= NOISE.sigma_min).all()


def test_stage_zero_is_a_denoiser() -> None:
    r = ECT().previous_level(LEVELS, 0, NOISE.sigma_min)
    torch.testing.assert_close(r, torch.full_like(r, NOISE.sigma_min), rtol=0, atol=0)


@pytest.mark.parametrize("stage", range(3, 9))
def test_the_gap_halves_with_every_stage(stage: int) -> None:
    """From stage 3 on the relative gap is below one everywhere; float64, away from the clamp."""
    t, settings = LEVELS.double()[40:], ECT()
    wide = t - settings.previous_level(t, stage, 0.0)
    narrow = t - settings.previous_level(t, stage + 1, 0.0)
    torch.testing.assert_close(wide / narrow, torch.full_like(t, 2.0))


def test_the_lower_level_by_hand() -> None:
    """t = 1, stage 4, k = 8, b = 1: the gap is (1 + 8 / (1 + e)) / 16 = 0.19697..."""
    r = ECT().previous_level(torch.tensor([1.0], dtype=torch.float64), 4, 0.002)
    assert r.item() == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 16, rel=1e-12)


def test_the_stages_are_equally_long_and_the_last_one_settles() -> None:
    settings = ECT(halvings=3, settle=0.25)
    stages = [settings.stage(step / 1000) for step in range(1000)]
    assert [stages.count(stage) for stage in range(4)] == [250, 250, 250, 250]
    assert stages == sorted(stages)


def test_a_training_that_goes_on_has_the_stages_that_are_left() -> None:
    settings = ECT(halvings=5, halved=3, settle=0.5)
    stages = [settings.stage(step / 1000) for step in range(1000)]
    assert [stages.count(stage) for stage in (3, 4, 5)] == [250, 250, 500]
    assert {ECT(halvings=5, halved=5).stage(step / 10) for step in range(10)} == {5}


@given(progress=st.floats(0, 1, exclude_max=True), halvings=st.integers(0, 10), settle=st.floats(0, 0.9))
def test_a_stage_is_never_beyond_the_last(progress: float, halvings: int, settle: float) -> None:
    stage = ECT(halvings=halvings, settle=settle).stage(progress)
    assert 0 <= stage <= halvings
    assert ECT(halvings=halvings, settle=settle).stage(0.0) == 0
    if progress > 1 - settle + 1e-9:
        assert stage == halvings


def test_the_loss_is_that_of_improved_consistency_training_at_its_levels() -> None:
    """Stage floor(7 x 0.5 / 0.75) = 4; levels of the middle and the quartiles of the distribution."""
    uniform = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    images, z, model = gaussian_images(3, 1), noise(3, 1, 2, 3, seed=2), GaussianConsistency(0.1, 0.8)
    t = [math.exp(-0.8 + 2.2 * quantile) for quantile in (-0.6744897502, 0.0, 0.6744897502)]
    r = [level * (1 - (1 + 8 / (1 + math.exp(level))) / 16) for level in t]
    expected = ict_loss(model, model, images, z, torch.tensor(t), torch.tensor(r), huber=0.03)
    found = ECT().losses(model, Batch(images, z, uniform, 0.5), NOISE, model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def loss_at_gap(model: nn.Module, stage: int) -> Tensor:
    """The mean loss on Gaussian data at t = 0.05 .. 10, the relative gap being 2^-stage."""
    images, z = gaussian_images(4000, 8), noise(4000, 1, 2, 3, seed=9)
    t = torch.logspace(math.log10(0.05), 1, 4000)
    r = ECT(gap_scale=0.0).previous_level(t, stage, NOISE.sigma_min)
    return ict_loss(model, model, images, z, t, r, huber=1.0).mean()


def test_the_exact_consistency_function_has_a_loss_that_vanishes_with_the_gap() -> None:
    exact = GaussianConsistency(MU, S)
    losses = [loss_at_gap(exact, stage).item() for stage in range(3, 9)]
    halved = [a / b for a, b in itertools.pairwise(losses)]
    assert halved == pytest.approx([2.0] * len(halved), rel=0.1)


def test_the_levels_that_a_model_sees_lie_in_the_noise_range() -> None:
    """Even with a spread that reaches far beyond both ends."""
    seen: list[Tensor] = []

    def watched(noisy: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return noisy

    objective = ECT(sigma_std=50.0)
    losses = objective.losses(watched, drawn(gaussian_images(500, 2), 0.9, 3), NOISE, watched)
    t, r = seen
    assert t.max() == NOISE.sigma_max
    assert t.min() > NOISE.sigma_min
    assert r.min() == pytest.approx(NOISE.sigma_min)
    assert torch.isfinite(losses).all()
