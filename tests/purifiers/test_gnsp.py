"""GNSP: its rounds, their levels, and mean and variance on Gaussian data."""

import pytest
import torch

from cmap_defense.purifiers import GNSP
from cmap_defense.purifiers.vp import vp_sigma
from denoisers import MEAN, SPREAD, GaussianDenoiser, images_of

SEEDS = torch.tensor([4, 5])


@pytest.mark.parametrize(("name", "steps"), [("cifar10-linf", 470), ("svhn-linf", 380), ("imagenet-linf", 620)])
def test_passes_of_a_run(name: str, steps: int) -> None:
    assert GNSP.preset(name).steps == steps
    assert GNSP.preset(name).passes == 10 * steps


def test_every_round_goes_from_its_level_down_step_by_step() -> None:
    backbone = GaussianDenoiser()
    GNSP(rounds=(3, 5), n_latents=2)(backbone, images_of(), seeds=SEEDS, max_parallel=100)
    assert backbone.levels == pytest.approx([vp_sigma(t) for t in (3, 2, 1, 5, 4, 3, 2, 1)], rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_mean_and_variance_on_gaussian_data(eta: float) -> None:
    """Step by step for mean and variance; the denoiser is linear and nothing is clipped."""
    purifier = GNSP(rounds=(20, 30), eta=eta, n_latents=400)
    slope, offset, variance = 1.0, 0.0, 0.0
    for top in purifier.rounds:
        variance += vp_sigma(top) ** 2
        for t in range(top, 0, -1):
            high, low = vp_sigma(t), vp_sigma(t - 1)
            pull = SPREAD**2 / (SPREAD**2 + high**2)
            added = eta**2 * low**2 * (high**2 - low**2) / high**2
            ratio = ((low**2 - added) ** 0.5) / high
            factor = pull + ratio * (1 - pull)
            slope, offset = factor * slope, factor * offset + (1 - ratio) * (1 - pull) * MEAN
            variance = factor**2 * variance + added
    with torch.no_grad():
        found = 2 * purifier(GaussianDenoiser(), images_of(), seeds=SEEDS).images - 1
    expected = slope * (2 * images_of() - 1) + offset
    assert ((found.mean(dim=1) - expected).abs() < 5.5 * (variance / 400) ** 0.5).all()
    assert found.var(dim=1).mean().sqrt().item() == pytest.approx(variance**0.5, rel=0.01)


def test_the_denoised_image_is_not_clipped_but_the_output_is_clamped() -> None:
    seen: list[float] = []

    class Far(GaussianDenoiser):
        def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            seen.append(noisy.max().item())
            return torch.full_like(noisy, 3.0)

    found = GNSP(rounds=(5, 5), n_latents=2)(Far(), images_of(), seeds=SEEDS, max_parallel=100).images
    assert seen[5] > 2.5
    assert torch.equal(found, torch.ones_like(found))
