"""Likelihood maximisation against torch's own Adam, image by image, and its second derivatives."""

import pytest
import torch
from torch import nn

from cmap_defense import load_backbone
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import LikelihoodMaximisation
from denoisers import DOUBLE, CurvedDenoiser, images_of, model_of
from toys import noise

SEEDS = torch.tensor([4, 5])


def test_steps_are_those_of_adam_on_each_image_alone() -> None:
    """The noise and the levels are taken from what the denoiser is given."""
    given: list[tuple[torch.Tensor, float]] = []

    class Recording(CurvedDenoiser):
        def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            given.append((noisy.detach().clone(), float(sigma)))
            return super().denoise(noisy, sigma)

    purifier = LikelihoodMaximisation(iterations=4, learning_rate=0.03)
    found = purifier(Recording(), images_of()[:1], seeds=SEEDS[:1], max_parallel=1).images[0, 0]
    x = nn.Parameter(2 * images_of()[:1] - 1)
    adam = torch.optim.Adam([x], lr=0.03)
    assert len(given) == 4
    for noisy, level in given:
        drawn = (noisy - x.detach()) / level
        assert 0.4 <= level <= 0.6
        assert abs(drawn.mean()) < 0.5
        assert 0.7 < drawn.std() < 1.3
        adam.zero_grad()
        (CurvedDenoiser().denoise(x + level * drawn, level) - x).square().mean().backward()
        adam.step()
    torch.testing.assert_close(found, (x.detach()[0].clamp(-1, 1) + 1) / 2, rtol=1e-9, atol=1e-9)
    assert len({level for _, level in given}) == 4


def test_the_noise_is_unit_and_the_levels_are_uniform() -> None:
    given: list[tuple[torch.Tensor, float]] = []

    class Recording(CurvedDenoiser):
        def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            levels = torch.as_tensor(sigma, dtype=DOUBLE).flatten().expand(len(noisy)).tolist()
            given.extend(zip(noisy.detach(), levels, strict=True))
            return super().denoise(noisy, sigma)

    count = 400
    purifier = LikelihoodMaximisation(iterations=1, n_latents=count)
    purifier(Recording(), images_of(), seeds=SEEDS, max_parallel=2 * count)
    x = (2 * images_of() - 1).repeat_interleave(count, dim=0)
    levels = torch.tensor([level for _, level in given], dtype=DOUBLE)
    drawn = (torch.stack([noisy for noisy, _ in given]) - x) / levels[:, None, None, None]
    assert drawn.std().item() == pytest.approx(1, abs=0.01)
    assert abs(drawn.mean().item()) < 0.01
    assert levels.mean().item() == pytest.approx(0.5, abs=0.01)
    assert levels.std().item() == pytest.approx(0.2 / 12**0.5, abs=0.005)


def test_the_loss_goes_down_on_average() -> None:
    images = images_of()
    found = LikelihoodMaximisation(learning_rate=0.02)(CurvedDenoiser(), images, seeds=SEEDS).images[:, 0]
    drawn = noise(64, 1, *images.shape[1:], seed=3, dtype=DOUBLE)

    def loss(at: torch.Tensor) -> float:
        x = (2 * at - 1)[None].expand(64, -1, -1, -1, -1)
        noisy = (x + 0.5 * drawn).flatten(0, 1)
        return (CurvedDenoiser().denoise(noisy, 0.5) - x.flatten(0, 1)).square().mean().item()

    assert loss(found) < loss(images)


def test_the_exact_gradient_through_the_package_s_network() -> None:
    """Its attention and norms have second derivatives. Steps are small, as Adam's first one is nearly a sign."""
    backbone = load_backbone("fashion-mnist-edm", kind="denoiser", dtype=DOUBLE)
    images = images_of()[:, :1].repeat(1, 1, 4, 5)[:, :, :28, :28].contiguous()
    weights = noise(2, 1, 28, 28, seed=3, dtype=DOUBLE)
    purifier = LikelihoodMaximisation(iterations=2, learning_rate=0.03)

    def loss(at: torch.Tensor) -> torch.Tensor:
        return (purifier(backbone, at, seeds=SEEDS).images[:, 0] * weights).sum()

    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    direction = noise(2, 1, 28, 28, seed=4, dtype=DOUBLE)
    with torch.no_grad():
        ends = [loss(images + sign * 1e-8 * direction).item() for sign in (1, -1)]
    assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-8, rel=1e-4)


def test_without_second_derivatives_the_gradient_would_be_another() -> None:
    """So the finite differences of the shared tests see them."""

    class FirstOrder(CurvedDenoiser):
        def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            return super().denoise(noisy, sigma).detach() + 0 * noisy

    purifier = LikelihoodMaximisation(iterations=3, n_latents=2)
    gradients = []
    for backbone in (CurvedDenoiser(), FirstOrder()):
        leaf = images_of().requires_grad_()
        model = model_of(purifier, backbone, gradient=Unrolled())
        gradients.append(torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0])
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2, atol=1e-6)
