"""Training of a denoiser: the loss, its weight, and what it makes of the uniform numbers."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from cmap_defense.backbones import NoiseRange
from cmap_defense.training.objectives import EDM, Batch
from cmap_defense.training.objectives.edm import edm_loss
from toys import noise
from training import gaussian

IMAGES, Z = noise(3, 2, 4, 5, seed=4, dtype=torch.float64), noise(3, 2, 4, 5, seed=5, dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_loss_is_its_formula(sigma_data: float) -> None:
    sigma = torch.tensor([0.002, 0.7, 30.0], dtype=torch.float64)
    denoised = gaussian.at_levels(gaussian.plain_denoiser, gaussian.plain_noisy(IMAGES, Z, sigma), sigma)
    expected = [
        (s**2 + sigma_data**2) / (s * sigma_data) ** 2 * square
        for s, square in zip(sigma.tolist(), gaussian.plain_squares(denoised, gaussian.rows(IMAGES)), strict=True)
    ]
    found = edm_loss(gaussian.GaussianDenoiser(), IMAGES, Z, sigma, sigma_data=sigma_data)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_an_untrained_network_has_the_same_loss_at_all_levels() -> None:
    """That is what the weight is for: with F = 0 on N(0, sigma_data^2) data, D = c_skip x, and the mean is 1 per
    element."""
    noise_range = NoiseRange(sigma_data=0.5)

    def untrained(noisy: Tensor, sigma: Tensor) -> Tensor:
        return (0.25 / (0.25 + sigma**2))[:, None, None, None] * noisy

    images, z = 0.5 * noise(20000, 1, 2, 3, seed=1), noise(20000, 1, 2, 3, seed=9)
    for level in (0.01, 0.5, 20.0):
        sigma = torch.full((20000,), level)
        mean = edm_loss(untrained, images, z, sigma, sigma_data=noise_range.sigma_data).mean().item() / 6
        assert mean == pytest.approx(1.0, abs=0.012)  # three standard errors


def test_levels_are_lognormal_and_the_noise_ranges_sigma_data_counts() -> None:
    uniform = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    images, z = gaussian.gaussian_images(3, 1), noise(3, 1, 2, 3, seed=2)
    seen: list[Tensor] = []

    def model(noisy: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return torch.zeros_like(noisy)

    def unused(noisy: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("a denoiser has no target but the image")

    found = EDM(sigma_mean=-0.4, sigma_std=0.9).losses(
        model, Batch(images, z, uniform, 0.5), NoiseRange(sigma_data=0.8), unused
    )
    expected = [math.exp(statistics.NormalDist(-0.4, 0.9).inv_cdf(u)) for u in uniform.tolist()]
    assert seen[0].tolist() == pytest.approx(expected, rel=1e-6)
    weights = [(s**2 + 0.64) / (0.8 * s) ** 2 for s in expected]
    squares = images.double().square().flatten(1).sum(dim=1).tolist()
    assert found.tolist() == pytest.approx([w * q for w, q in zip(weights, squares, strict=True)], rel=1e-5)
