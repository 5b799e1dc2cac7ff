"""DiffPure on Gaussian data, where every step is known, and against the bugs of the official code."""

import math

import pytest
import torch

from cmap_defense.purifiers import DiffPure
from cmap_defense.purifiers.steps import ddim_step, ddpm_step
from cmap_defense.purifiers.vp import vp_sigma, vp_sigma_at
from denoisers import DOUBLE, MEAN, GaussianDenoiser, images_of
from toys import noise

COUNT = 200
SPREAD = 0.1
SEEDS = torch.tensor([4, 5])


def moments(purifier: DiffPure) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [B, C, H, W] and standard deviation (one number) of the versions, in units of [-1, 1]."""
    with torch.no_grad():
        found = purifier.replace(n_latents=COUNT)(GaussianDenoiser(spread=SPREAD), images_of(), seeds=SEEDS).images
    assert ((found > 0) & (found < 1)).all(), "the clamp would change the moments"
    found = 2 * found - 1
    return found.mean(dim=1), found.var(dim=1).mean().sqrt()


@pytest.mark.parametrize("t", [30, 100])
@pytest.mark.parametrize("solver", ["sde", "ode"])
def test_mean_and_variance_are_those_of_the_exact_solution(t: int, solver: str) -> None:
    """The ODE shrinks the distance from the mean; the SDE draws from the posterior. Finer steps come nearer to both."""
    sigma = vp_sigma(t)
    shrink = SPREAD**2 / (SPREAD**2 + sigma**2)
    if solver == "ode":
        factor, variance = math.sqrt(shrink), shrink * sigma**2
    else:
        factor, variance = shrink, (shrink * sigma) ** 2 + shrink * sigma**2
    start = 2 * images_of() - 1
    mean, std = moments(DiffPure(t=t, solver=solver, step=2e-4))
    expected = MEAN + factor * (start - MEAN)
    assert ((mean - expected).abs() < 5.5 * variance**0.5 / COUNT**0.5 + 2e-3).all()
    assert (mean - expected).mean().abs() < 5 * (variance / COUNT / start.numel()) ** 0.5 + 1e-3
    assert std.item() == pytest.approx(variance**0.5, rel=0.01)
    coarse = moments(DiffPure(t=t, solver=solver))[1].item()
    assert coarse == pytest.approx(variance**0.5, rel=0.05)


@pytest.mark.parametrize("variance", ["posterior", "fixedlarge"])
def test_mean_and_variance_of_ddpm_are_those_of_its_own_recursion(variance: str) -> None:
    """The recursion of Ho et al. in VP coordinates, with x0 as the denoiser gives it, for mean and variance."""
    t = 60
    betas = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(t)]
    kept = [math.prod(1 - beta for beta in betas[: i + 1]) for i in range(t)]
    slope, offset, square = math.sqrt(kept[-1]), 0.0, 1 - kept[-1]  # of x_VP = slope x + offset, and its variance
    for i in range(t - 1, -1, -1):
        before = kept[i - 1] if i else 1.0
        level2 = (1 - kept[i]) / kept[i]
        pull = SPREAD**2 / (SPREAD**2 + level2)  # x0 = pull x_VP / sqrt(kept) + (1 - pull) MEAN
        to_clean = math.sqrt(before) * betas[i] / (1 - kept[i])
        to_noisy = math.sqrt(1 - betas[i]) * (1 - before) / (1 - kept[i])
        factor = to_noisy + to_clean * pull / math.sqrt(kept[i])
        added = 0.0 if i == 0 else betas[i] * ((1 - before) / (1 - kept[i]) if variance == "posterior" else 1.0)
        slope, offset = factor * slope, factor * offset + to_clean * (1 - pull) * MEAN
        square = factor**2 * square + added
    purifier = DiffPure(t=t, solver="ddpm", variance=variance, clip_denoised=False)
    mean, std = moments(purifier)
    expected = slope * (2 * images_of() - 1) + offset
    assert ((mean - expected).abs() < 5.5 * (square / COUNT) ** 0.5).all()
    assert std.item() == pytest.approx(square**0.5, rel=0.01)


def test_one_ddpm_step_is_that_of_the_paper_and_ddim_between_it_and_the_ode() -> None:
    high, low = vp_sigma(50), vp_sigma(49)
    noisy, clean, drawn = (noise(2, 3, 4, 5, seed=seed, dtype=DOUBLE) for seed in range(3))
    kept, before = 1 / (1 + high**2), 1 / (1 + low**2)
    beta = 1 - kept / before
    x = math.sqrt(kept) * noisy
    mean = math.sqrt(before) * beta / (1 - kept) * clean + math.sqrt(1 - beta) * (1 - before) / (1 - kept) * x
    for variance, size in (("posterior", beta * (1 - before) / (1 - kept)), ("fixedlarge", beta)):
        expected = (mean + math.sqrt(size) * drawn) / math.sqrt(before)
        torch.testing.assert_close(ddpm_step(noisy, clean, high, low, drawn, variance=variance), expected)
    torch.testing.assert_close(
        ddim_step(noisy, clean, high, low, drawn, eta=1.0), ddpm_step(noisy, clean, high, low, drawn)
    )
    euler = noisy + (low - high) * (noisy - clean) / high
    torch.testing.assert_close(ddim_step(noisy, clean, high, low, drawn), euler)
    assert torch.equal(ddpm_step(noisy, clean, high, 0.0, drawn), clean)


@pytest.mark.parametrize(("t", "steps"), [(1, 1), (75, 75), (100, 100), (150, 150)])
def test_there_is_a_step_for_each_level(t: int, steps: int) -> None:
    for solver in ("sde", "ode", "ddpm"):
        assert DiffPure(t=t, solver=solver).steps == steps
    assert DiffPure(t=t, step=1e-3).times[-1] == 1e-5
    assert vp_sigma_at(DiffPure(t=t).times[0]) == pytest.approx(vp_sigma(t), rel=1e-9)


def test_the_solver_starts_at_the_level_of_the_noise() -> None:
    """The official code noises by the discrete levels and denoises by the continuous ones."""
    for solver in ("sde", "ode", "ddpm"):
        backbone = GaussianDenoiser()
        DiffPure(t=40, solver=solver)(backbone, images_of(), seeds=SEEDS, max_parallel=100)
        assert backbone.levels[0] == pytest.approx(vp_sigma(40), rel=1e-9)
        assert backbone.levels == sorted(backbone.levels, reverse=True)


def test_no_noise_is_left_and_the_output_is_clamped() -> None:
    """The official code leaves noise of 0.0109 and does not clamp."""

    class White(GaussianDenoiser):
        def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            return torch.full_like(noisy, 1.5)

    found = DiffPure(t=20, n_latents=3)(White(), images_of(), seeds=SEEDS).images
    assert torch.equal(found, torch.ones_like(found))

    class Constant(GaussianDenoiser):
        def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            return torch.full_like(noisy, 0.2)

    found = 2 * DiffPure(t=20, n_latents=50)(Constant(), images_of(), seeds=SEEDS).images - 1
    assert found.std() < 0.005
    assert found.mean().item() == pytest.approx(0.2, abs=1e-3)


def test_there_are_k_results_and_no_concatenation_of_rounds() -> None:
    """The official code returns the results of repeated rounds one behind the other."""
    assert DiffPure(t=3, n_latents=4)(GaussianDenoiser(), images_of(), seeds=SEEDS).images.shape[:2] == (2, 4)


def test_a_level_as_a_tensor_is_that_as_a_number() -> None:
    """In the official code the time is a tensor in one pass and a number in the other, and the gradient is wrong."""
    from cmap_defense import load_backbone

    backbone = load_backbone("fashion-mnist-edm", kind="denoiser", dtype=torch.float64)
    noisy = noise(2, 1, 28, 28, seed=1, dtype=DOUBLE)
    levels = torch.full((2,), 0.3388, dtype=DOUBLE)
    torch.testing.assert_close(backbone.denoise(noisy, levels), backbone.denoise(noisy, 0.3388), rtol=1e-12, atol=1e-12)
