"""Samples: of a consistency model in one step, of a denoiser along its trajectories."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from cmap_defense.backbones import CompactUNetConfig, ConsistencyBackbone, EDMDenoiser
from cmap_defense.backbones.karras import karras_levels
from cmap_defense.common.rng import draw_latents
from cmap_defense.training.run import sample_grid
from training.trained import NETWORK, fresh_backbone

MU, S = 0.2, 0.3


class GaussianNetwork(nn.Module):
    """F of the exact denoiser D(x, t) = mu + (x - mu) s^2 / (s^2 + t^2) of data N(mu, s^2), sigma_data being 0.5."""

    def forward(self, scaled: Tensor, noise_level: Tensor) -> Tensor:
        t = (4 * noise_level).exp().double()[:, None, None, None]
        x = scaled.double() * (t**2 + 0.25).sqrt()
        denoised = MU + (x - MU) * S**2 / (S**2 + t**2)
        c_skip, c_out = 0.25 / (t**2 + 0.25), t * 0.5 / (t**2 + 0.25).sqrt()
        return (denoised - c_skip * x) / c_out


def test_a_denoisers_samples_lie_on_its_trajectories() -> None:
    """dx/dt = a(t) (x - mu) with a(t) = t / (s^2 + t^2): x - mu grows as sqrt(s^2 + t^2), and nearly so in 17 steps of
    Heun and one of Euler."""
    found = sample_grid(EDMDenoiser(GaussianNetwork(), (2, 5, 3)))
    levels = karras_levels(18)[::-1]
    growth = 1 - levels[-1] ** 2 / (S**2 + levels[-1] ** 2)
    for t, r in itertools.pairwise(levels):
        there, here = r / (S**2 + r**2), t / (S**2 + t**2)
        growth *= 1 + (r - t) * (here + there * (1 + (r - t) * here)) / 2
    assert growth == pytest.approx(S / (S**2 + 80**2) ** 0.5, rel=0.1)
    u = draw_latents(torch.tensor([0]), 64, (2, 5, 3))[0].double()
    expected = MU + (80 * u - MU) * growth
    assert found.shape == (64, 2, 5, 3)
    torch.testing.assert_close(found.double(), ((expected + 1) / 2).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_consistency_models_samples_are_its_one_step_images() -> None:
    backbone = fresh_backbone().eval()
    latents = draw_latents(torch.tensor([0]), 64, (1, 8, 8))[0]
    with torch.no_grad():
        expected = (backbone.generate(latents) + 1) / 2
    assert torch.equal(sample_grid(backbone), expected)
    assert not torch.equal(sample_grid(backbone, seed=1), expected)


@pytest.mark.parametrize("kind", [ConsistencyBackbone, EDMDenoiser])
def test_classes_come_one_after_the_other(kind: type[ConsistencyBackbone | EDMDenoiser]) -> None:
    config: CompactUNetConfig = NETWORK.replace(num_classes=3)
    model = kind(fresh_backbone(config).network, (1, 8, 8), num_classes=3).eval()
    calls: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[2]))
    images = sample_grid(model)
    assert images.shape == (64, 1, 8, 8)
    assert ((images >= 0) & (images <= 1)).all()
    assert all(labels.tolist() == [n % 3 for n in range(64)] for labels in calls)
    assert len(calls) == (1 if kind is ConsistencyBackbone else 2 * 17 + 1)
