"""GDMP: its passes and levels, and a guide whose strength does not depend on the batch."""

import math

import pytest
import torch
from torch import Tensor

from cmap_defense.errors import SettingsError
from cmap_defense.purifiers import GDMP, DiffPure, Run
from cmap_defense.purifiers.gdmp import _ssim_gradient
from cmap_defense.purifiers.vp import vp_sigma
from denoisers import DOUBLE, GaussianDenoiser, images_of
from toys import noise, uniform

SEEDS = torch.tensor([4, 5])


@pytest.mark.parametrize(
    ("name", "passes", "level"),
    [
        ("cifar10-linf", 10 * 36 * 4, 0.1276),
        ("cifar10-bpda", 10 * 60 * 2, 0.2053),
        ("cifar10-spsa", 50 * 2, 0.1728),
        ("imagenet-linf", 45, 0.627),
    ],
)
def test_passes_and_levels_of_the_presets(name: str, passes: int, level: float) -> None:
    purifier = GDMP.preset(name)
    assert purifier.passes == passes
    assert purifier.level == pytest.approx(level, abs=5e-4)


def test_every_round_begins_at_the_level_that_it_was_noised_to() -> None:
    """The official code noises to one level more than it denoises from."""
    backbone = GaussianDenoiser()
    GDMP(t=36, rounds=2, n_latents=1)(backbone, images_of(), seeds=SEEDS, max_parallel=100)
    expected = [vp_sigma(t) for _ in range(2) for t in range(36, 0, -1)]
    assert backbone.levels == pytest.approx(expected, rel=1e-9)


def test_variances_are_beta_and_at_the_end_that_of_the_posterior_of_index_1() -> None:
    betas = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(36)]
    found = GDMP().variances()
    assert found[1:] == pytest.approx(betas[1:], rel=1e-9)
    assert found[0] == pytest.approx(betas[1] * 1e-4 / (1 - (1 - betas[0]) * (1 - betas[1])), rel=1e-9)


@pytest.mark.parametrize(("strength", "closed"), [(600.0, 0.026), (60000.0, 0.938)])
def test_the_share_of_the_gap_that_a_round_closes(strength: float, closed: float) -> None:
    """2.6 % with the official constant at a batch of 100, 93.8 % with the same constant at a batch of 1."""
    sigmas, variances = [vp_sigma(t) for t in range(1, 37)], GDMP().variances()
    left = math.prod(
        1 - variance * 3 * strength * sigma / (8 / 255 * 3072)
        for sigma, variance in zip(sigmas, variances, strict=True)
    )
    assert 1 - left == pytest.approx(closed, abs=2e-3)


def test_without_a_guide_a_round_is_ddpm() -> None:
    one = GDMP(t=20, rounds=1, guide="none", n_latents=3)(GaussianDenoiser(), images_of(), seeds=SEEDS)
    other = DiffPure(t=20, solver="ddpm", n_latents=3)(GaussianDenoiser(), images_of(), seeds=SEEDS)
    torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 8, 6), (1, 16, 16)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("noised", [False, True])
def test_in_the_purifier_the_share_depends_on_neither_batch_nor_size(
    size: tuple[int, int, int], count: int, noised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser that keeps its input (D = x) and steps without noise leave the guide alone to move the images."""

    class Keeping(GaussianDenoiser):
        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            return noisy

    target_noise = noise(count, *size, seed=9, dtype=DOUBLE)

    def chosen(run: Run) -> Tensor:
        """The start; then nothing in a step, and, where the target is noised, one noise for it before each."""
        run._drawn += 1
        if run._drawn == 1:
            return run.first.flatten(0, 1)
        return target_noise if noised and run._drawn % 2 else torch.zeros_like(run.images)

    monkeypatch.setattr(Run, "noise", chosen)
    images = 0.4 + 0.2 * uniform(count, *size, seed=3, dtype=DOUBLE)
    start = noise(count, 1, *size, seed=8, dtype=DOUBLE)
    purifier = GDMP(t=2, rounds=1, strength=6000.0, noise_target=noised, n_latents=1)
    found = purifier(Keeping(size), images, seeds=torch.arange(count), latents=start).images[:, 0]
    target = 2 * images - 1
    x = target + vp_sigma(2) * start[:, 0]
    for index in (1, 0):
        high, low = vp_sigma(index + 1), vp_sigma(index)
        share = purifier.variances()[index] * 3 * 6000.0 * high / (8 / 255 * 3072)
        aim = (target + high * target_noise) / math.sqrt(1 + high**2) if noised else target
        x = x + share * math.sqrt(1 + low**2) * (aim - x / math.sqrt(1 + high**2))
    torch.testing.assert_close(2 * found - 1, x, rtol=0, atol=1e-12)


def test_the_guide_draws_towards_the_input_in_every_round() -> None:
    images = images_of()
    loose, guided, pinned = (
        (GDMP(t=20, rounds=3, strength=strength, n_latents=4)(GaussianDenoiser(), images, seeds=SEEDS).images)
        for strength in (0.0, 2e4, 1e5)
    )
    gaps = [(found - images[:, None]).abs().mean().item() for found in (loose, guided, pinned)]
    assert gaps[0] > 1.1 * gaps[1]
    assert gaps[1] > gaps[2]


def test_the_ssim_guide_is_the_gradient_of_the_mean_ssim_of_the_image_alone() -> None:
    from cmap_defense.cmap.ssim import SSIMReference

    images, target = (0.5 * noise(3, 3, 16, 12, seed=seed, dtype=DOUBLE) for seed in (1, 2))
    found = _ssim_gradient(images, target)
    torch.testing.assert_close(_ssim_gradient(images[1:2], target[1:2]), found[1:2])
    direction = noise(3, 16, 12, seed=3, dtype=DOUBLE)
    ends = [SSIMReference.of(target[:1]).ssim_sum(images[:1] + s * direction).item() for s in (1e-6, -1e-6)]
    assert (found[0] * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6 / (3 * 16 * 12), rel=1e-6)


def test_t_is_one_of_the_levels() -> None:
    assert GDMP(t=250, levels=250).sigmas
    with pytest.raises(SettingsError, match=r"GDMP\.t must be .*251"):
        GDMP(t=251, levels=250)
