"""ADP against a plain loop over pixels in Python's own numbers."""

import numpy as np
import pytest
import torch

from cmap_defense.common.rng import draw_latents
from cmap_defense.purifiers import ADP
from cmap_defense.purifiers.adp import adaptive_step
from denoisers import DOUBLE, SHAPE, CurvedDenoiser, images_of
from toys import noise

SEEDS = torch.tensor([4, 5])


def plainly(purifier: ADP, image: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, int, list[float]]:
    """Purified image in [0, 1], passes and step sizes of one version."""
    backbone = CurvedDenoiser()

    def score(point: np.ndarray, level: float) -> np.ndarray:
        clean = backbone.denoise(torch.from_numpy(2 * point - 1)[None], 2 * level)[0].numpy()
        return ((clean + 1) / 2 - point) / level

    x = np.clip(image + purifier.noise * drawn, 0, 1)
    level, passes, sizes = purifier.noise, 0, []
    for _ in range(purifier.iterations):
        g = score(x, level)
        trial = score(x + 1e-3 * g, level)
        passes += 2
        z = float((g * trial).sum() / (g * g).sum())
        alpha = min(max(purifier.rate * 1e-3 / (1 - z), 1e-5), 0.1)
        sizes.append(alpha)
        if alpha <= 1e-3:
            break
        x = np.clip(x + alpha * g, 0, 1)
        level = max(level - alpha, 0.001)
    return x, passes, sizes


@pytest.mark.parametrize("rate", [0.05, 0.02, 0.5])
@pytest.mark.parametrize("noise_level", [0.25, 0.05])
def test_steps_are_those_of_a_plain_loop(rate: float, noise_level: float) -> None:
    purifier = ADP(noise=noise_level, iterations=6, rate=rate, n_latents=3)
    images, drawn = images_of(), draw_latents(SEEDS, 3, SHAPE).double()
    result = purifier(CurvedDenoiser(), images, seeds=SEEDS)
    assert result.passes is not None
    spent = [0, 0]
    for b in range(2):
        for k in range(3):
            expected, passes, sizes = plainly(purifier, images[b].numpy(), drawn[b, k].numpy())
            spent[b] += passes
            np.testing.assert_allclose(result.images[b, k].numpy(), expected, rtol=0, atol=1e-12)
            assert max(sizes) > 1e-3 or noise_level == 0.05  # where they stop at once
    assert result.passes.tolist() == spent


def test_images_stop_one_by_one_and_for_good() -> None:
    purifier = ADP(noise=0.05, iterations=10, rate=0.01, n_latents=8)
    result = purifier(CurvedDenoiser(), images_of(4), seeds=torch.arange(4))
    assert result.passes is not None
    assert (result.passes < purifier.passes).any()
    longer = purifier.replace(iterations=30)(CurvedDenoiser(), images_of(4), seeds=torch.arange(4))
    done = result.passes == longer.passes
    torch.testing.assert_close(longer.images[done], result.images[done])


def test_passes_are_those_of_the_paper() -> None:
    assert ADP().passes == 200
    assert ADP().level == 0.5
    assert ADP.preset("cifar10-low-noise").noise == 0.1


def test_the_contrast_is_not_stretched() -> None:
    """The official code maps x to 256 / 255 x - 1 / 510 in every iteration."""

    class Keeping(CurvedDenoiser):
        def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
            return noisy

    images = images_of()
    found = ADP(noise=1e-9, n_latents=1)(Keeping(), images, seeds=SEEDS).images[:, 0]
    torch.testing.assert_close(found, images, rtol=0, atol=1e-7)


def test_step_sizes_at_their_bounds_have_finite_gradients() -> None:
    first = torch.zeros(4, 2, dtype=DOUBLE)
    first[1:] = noise(3, 2, seed=1, dtype=DOUBLE)
    second = first.clone()
    second[2] *= 1.5
    second[3] *= 1 - 1e-3
    leaves = first.requires_grad_(), second.requires_grad_()
    alpha = adaptive_step(*leaves, 0.05)
    assert alpha.tolist() == pytest.approx([1e-5, 0.1, 1e-5, 0.05])
    for gradient in torch.autograd.grad(alpha.sum(), leaves):
        assert torch.isfinite(gradient).all()
        assert (gradient[3] != 0).all()
        assert (gradient[:3] == 0).all()
