"""Consistency training: the pair of noise levels, the distance, the loss, and what the whole is a loss for.

For data with independent normal elements N(mu, s^2) the consistency function is known. The marginal at noise level t is
N(mu, s^2 + t^2), so the probability-flow ODE (Karras et al. 2022, eq. 1) reads dx/dt = -t score = t (x - mu) / (s^2 +
t^2), and x - mu grows along a trajectory as sqrt(s^2 + t^2). From f(x, sigma_min) = x follows

    f(x, t) = mu + (x - mu) sqrt((s^2 + sigma_min^2) / (s^2 + t^2)).
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.backbones import NoiseRange
from cmap_defense.errors import SettingsError
from cmap_defense.rng import generator_for
from cmap_defense.training.objectives import ECT, Batch, ECTSettings
from cmap_defense.training.objectives.distances import pseudo_huber
from cmap_defense.training.objectives.ect import ect_loss, ect_previous_level, ect_stage
from toys import noise

MU, S = 0.3, 0.5
NOISE = NoiseRange()
LEVELS = torch.logspace(math.log10(NOISE.sigma_min * 1.001), math.log10(NOISE.sigma_max), 200)


class GaussianConsistency(nn.Module):
    """The consistency function of N(mean, std^2) data; both are parameters, the arithmetic is float64."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        variance = (2 * self.log_std).exp()
        shrink = ((variance + NOISE.sigma_min**2) / (variance + sigma.double() ** 2)).sqrt()[:, None, None, None]
        return self.mean + (noisy - self.mean) * shrink


# --- the levels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(9))
def test_the_lower_level_lies_below_and_inside_the_range(stage: int) -> None:
    r = ect_previous_level(LEVELS, stage, ECTSettings(), NOISE.sigma_min)
    assert (r < LEVELS).all()
    assert (r >= NOISE.sigma_min).all()


def test_stage_zero_is_a_denoiser() -> None:
    r = ect_previous_level(LEVELS, 0, ECTSettings(), NOISE.sigma_min)
    torch.testing.assert_close(r, torch.full_like(r, NOISE.sigma_min), rtol=0, atol=0)


@pytest.mark.parametrize("stage", range(3, 9))
def test_the_gap_halves_with_every_stage(stage: int) -> None:
    """From stage 3 on the relative gap is below one everywhere; float64, away from the clamp."""
    t, settings = LEVELS.double()[40:], ECTSettings()
    wide = t - ect_previous_level(t, stage, settings, 0.0)
    narrow = t - ect_previous_level(t, stage + 1, settings, 0.0)
    torch.testing.assert_close(wide / narrow, torch.full_like(t, 2.0))


def test_the_lower_level_by_hand() -> None:
    """t = 1, stage 4, k = 8, b = 1: the gap is (1 + 8 / (1 + e)) / 16 = 0.19697..."""
    r = ect_previous_level(torch.tensor([1.0], dtype=torch.float64), 4, ECTSettings(), 0.002)
    assert r.item() == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 16, rel=1e-12)


def test_the_stages_are_equally_long_and_the_last_one_settles() -> None:
    settings = ECTSettings(halvings=3, settle=0.25)
    stages = [ect_stage(step / 1000, settings) for step in range(1000)]
    assert [stages.count(stage) for stage in range(4)] == [250, 250, 250, 250]
    assert stages == sorted(stages)


@settings(deadline=None)
@given(progress=st.floats(0, 1, exclude_max=True), halvings=st.integers(0, 10), settle=st.floats(0, 0.9))
def test_a_stage_is_never_beyond_the_last(progress: float, halvings: int, settle: float) -> None:
    stage = ect_stage(progress, ECTSettings(halvings=halvings, settle=settle))
    assert 0 <= stage <= halvings
    assert ect_stage(0.0, ECTSettings(halvings=halvings, settle=settle)) == 0
    if progress > 1 - settle + 1e-9:
        assert stage == halvings


@pytest.mark.parametrize(
    "wrong", [{"sigma_std": 0.0}, {"halvings": -1}, {"settle": 1.0}, {"gap_steepness": 0.0}, {"huber": -0.1}]
)
def test_settings_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        ECTSettings(**wrong)


# --- the distance and the loss ----------------------------------------------------------------------------------------


def plain_huber(a: Tensor, b: Tensor, c: float) -> list[float]:
    """sqrt(||a - b||^2 + c^2) - c per image, number by number."""
    return [
        math.sqrt(math.fsum((p - q) ** 2 for p, q in zip(x, y, strict=True)) + c * c) - c
        for x, y in zip(a.double().flatten(1).tolist(), b.double().flatten(1).tolist(), strict=True)
    ]


@pytest.mark.parametrize("c", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_pseudo_huber_is_its_formula(c: float, scale: float) -> None:
    a, b = scale * noise(3, 2, 5, 4, seed=1), scale * noise(3, 2, 5, 4, seed=2)
    expected = torch.tensor(plain_huber(a, b, c))
    torch.testing.assert_close(pseudo_huber(a, b, c), expected, rtol=2e-6, atol=0)


def test_pseudo_huber_of_equal_images_is_zero() -> None:
    a = noise(2, 1, 3, 4, seed=3)
    assert (pseudo_huber(a, a.clone(), 0.03) == 0).all()


def test_pseudo_huber_has_a_gradient_where_the_images_are_equal() -> None:
    a = noise(2, 1, 3, 4, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(pseudo_huber(a, a.detach().clone(), 0.03).sum(), a)
    assert (gradient == 0).all()


def test_the_loss_is_its_formula() -> None:
    images, z = noise(3, 2, 4, 5, seed=4), noise(3, 2, 4, 5, seed=5)
    t, r = torch.tensor([0.5, 3.0, 20.0]), torch.tensor([0.4, 1.0, 0.002])
    model = GaussianConsistency(MU, S)
    found = ect_loss(model, model, images, z, t, r, huber=0.1)

    shrink = [[math.sqrt((S**2 + NOISE.sigma_min**2) / (S**2 + v**2)) for v in level.tolist()] for level in (t, r)]
    wide, narrow = (
        torch.stack([MU + (x + level[i].item() * n - MU) * shrink[side][i] for i, (x, n) in enumerate(pairs)])
        for side, level in enumerate((t.double(), r.double()))
        for pairs in [list(zip(images.double(), z.double(), strict=True))]
    )
    expected = torch.tensor(plain_huber(wide, narrow, 0.1)) / (t - r)
    torch.testing.assert_close(found.float(), expected, rtol=5e-6, atol=0)


def test_no_gradient_flows_through_the_second_image() -> None:
    """Only the call at the higher level may see autograd."""
    images, z = noise(2, 1, 4, 5, seed=6), noise(2, 1, 4, 5, seed=7)
    t, r = torch.tensor([0.5, 2.0]), torch.tensor([0.4, 1.0])
    asked: list[tuple[bool, Tensor]] = []
    model = GaussianConsistency(MU, S)

    def watched(noisy: Tensor, sigma: Tensor) -> Tensor:
        asked.append((torch.is_grad_enabled(), sigma))
        return model(noisy, sigma)

    ect_loss(watched, watched, images, z, t, r, huber=0.1).sum().backward()
    assert [(grad, sigma.tolist()) for grad, sigma in asked] == [(True, t.tolist()), (False, r.tolist())]
    assert model.mean.grad is not None


# --- what it is a loss for --------------------------------------------------------------------------------------------


def gaussian_images(count: int, seed: int) -> Tensor:
    return MU + S * noise(count, 1, 2, 3, seed=seed)


def drawn(images: Tensor, progress: float, *words: int) -> Batch:
    """What the loop would draw."""
    generator = generator_for(*words)
    uniform = torch.rand(len(images), generator=generator, dtype=torch.float64)
    return Batch(images, torch.randn(images.shape, generator=generator), uniform, progress)


def loss_at_gap(model: nn.Module, stage: int) -> Tensor:
    """The mean loss on Gaussian data at t = 0.05 .. 10, the relative gap being 2^-stage."""
    images, z = gaussian_images(4000, 8), noise(4000, 1, 2, 3, seed=9)
    t = torch.logspace(math.log10(0.05), 1, 4000)
    r = ect_previous_level(t, stage, ECTSettings(gap_scale=0.0), NOISE.sigma_min)
    return ect_loss(model, model, images, z, t, r, huber=1.0).mean()


def test_the_exact_consistency_function_has_a_loss_that_vanishes_with_the_gap() -> None:
    exact = GaussianConsistency(MU, S)
    losses = [loss_at_gap(exact, stage).item() for stage in range(3, 9)]
    halved = [a / b for a, b in itertools.pairwise(losses)]
    assert halved == pytest.approx([2.0] * len(halved), rel=0.1)


def test_the_gradient_vanishes_at_the_exact_consistency_function_alone() -> None:
    def pull(std: float) -> float:
        model = GaussianConsistency(MU, std)
        (gradient,) = torch.autograd.grad(loss_at_gap(model, 8), model.log_std)
        return gradient.item()

    assert pull(0.7 * S) < 0 < pull(1.4 * S)
    assert abs(pull(S)) < 0.05 * min(abs(pull(0.7 * S)), abs(pull(1.4 * S)))


def train_linear(settings: ECTSettings, steps: int) -> GaussianConsistency:
    """A model that is linear in x, trained by ECT from a wrong mean and standard deviation."""
    model, objective = GaussianConsistency(-0.2, 1.5), ECT(settings)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = drawn(gaussian_images(256, 10 + step), step / steps, 0, step)
        losses = objective.losses(model, batch, NOISE, model)
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
    return model


def test_a_linear_model_converges_to_the_exact_consistency_function() -> None:
    model = train_linear(ECTSettings(), 1500)
    assert model.mean.item() == pytest.approx(MU, abs=0.02)
    assert model.log_std.exp().item() == pytest.approx(S, rel=0.04)


def test_a_loss_is_a_function_of_the_batch_alone() -> None:
    images, objective, model = gaussian_images(5, 1), ECT(), GaussianConsistency(MU, S)
    state = torch.random.get_rng_state()
    first = objective.losses(model, drawn(images, 0.5, 1, 2), NOISE, model)
    again = objective.losses(model, drawn(images, 0.5, 1, 2), NOISE, model)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(objective.losses(model, drawn(images, 0.5, 1, 3), NOISE, model), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (5,)


def test_the_levels_that_a_model_sees_lie_in_the_noise_range() -> None:
    """Even with a spread that reaches far beyond both ends."""
    seen: list[Tensor] = []

    def watched(noisy: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return noisy

    objective = ECT(ECTSettings(sigma_std=50.0))
    losses = objective.losses(watched, drawn(gaussian_images(500, 2), 0.9, 3), NOISE, watched)
    t, r = seen
    assert t.max() == NOISE.sigma_max
    assert t.min() > NOISE.sigma_min
    assert r.min() == pytest.approx(NOISE.sigma_min)
    assert torch.isfinite(losses).all()
