"""EPS against scores that are known, and what it may not depend on."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser
from cmap_defense.detection import EPS, vp_sigmas
from cmap_defense.errors import BackboneError, CmapError, InputTypeError, InputValueError, SettingsError
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
FEW = EPS(sigmas=(0.05, 0.2, 0.7), seed=3)


class Normal(nn.Module):
    """The best denoiser of data ~ N(mean, deviation^2), elements independent."""

    def __init__(self, deviation: float = 0.4) -> None:
        super().__init__()
        self.image_shape, self.deviation = SHAPE, deviation
        self.mean = nn.Parameter(0.3 * noise(*SHAPE, seed=9))

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        own = self.deviation**2
        return (own * noisy + sigma**2 * self.mean.to(noisy)) / (own + sigma**2)

    def score(self, noisy: Tensor, sigma: float) -> Tensor:
        """Of N(mean, deviation^2 + sigma^2)."""
        return -(noisy - self.mean) / (self.deviation**2 + sigma**2)


class Flow(Normal):
    """The consistency function of the same data, sigma_min = 0: the end of the path, at the image's own quantile."""

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return self.mean + (noisy - self.mean) / math.sqrt(1 + (sigma / self.deviation) ** 2)


class Scaled(nn.Module):
    """A network F of images, level and perhaps labels."""

    def forward(self, x: Tensor, level: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = 0.0 if labels is None else labels[:, None, None, None].to(x)
        return torch.tanh(x + level[:, None, None, None] + shift)


def clean_noisy(eps: EPS, images: Tensor) -> list[Tensor]:
    drawn = eps.noise(torch.arange(len(images)), images.shape[1:]).to(images)
    return [2 * images - 1 + sigma * n for sigma, n in zip(eps.sigmas, drawn.unbind(1), strict=True)]


def test_levels_are_those_of_a_ddpm() -> None:
    first, *_, last = vp_sigmas()
    assert len(vp_sigmas()) == 20
    assert first == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)))
    kept = 1.0
    for step in range(20):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
    assert last == pytest.approx(math.sqrt((1 - kept) / kept))
    assert kept**-0.5 < 1.003, "the factor that is left out"
    assert vp_sigmas(50)[:20] == vp_sigmas()
    assert vp_sigmas(50)[-1] == pytest.approx(0.173, abs=5e-4)


@given(count=st.integers(2, 4), deviation=st.floats(0.1, 2.0))
def test_with_the_best_denoiser_of_normal_data_it_is_the_mean_score(count: int, deviation: float) -> None:
    backbone, images = Normal(deviation).double(), uniform(count, *SHAPE, seed=count, dtype=torch.float64)
    found = FEW(backbone, images)
    scores = [backbone.score(x, s) for x, s in zip(clean_noisy(FEW, images), FEW.sigmas, strict=True)]
    torch.testing.assert_close(found, torch.stack(scores).mean(0).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sigma", "share"), [(0.001, 0.5), (400.0, 1.0)])
def test_a_consistency_model_of_normal_data_gives_half_the_score_to_the_whole(sigma: float, share: float) -> None:
    backbone, images, eps = Flow().double(), uniform(2, *SHAPE, seed=1, dtype=torch.float64), EPS(sigmas=(sigma,))
    whole = backbone.score(clean_noisy(eps, images)[0], sigma)
    torch.testing.assert_close(eps(backbone, images), share * whole.detach(), rtol=5e-3, atol=1e-9)


def test_with_an_edm_denoiser_it_is_the_mean_of_its_score() -> None:
    backbone, images = EDMDenoiser(Scaled(), SHAPE), uniform(2, *SHAPE, seed=1)
    scores = [backbone.score(x, s) for x, s in zip(clean_noisy(FEW, images), FEW.sigmas, strict=True)]
    torch.testing.assert_close(FEW(backbone, images), torch.stack(scores).mean(0), rtol=1e-4, atol=1e-4)


def test_it_is_the_same_in_every_batch_and_chunk() -> None:
    backbone, images = Normal(), uniform(5, *SHAPE, seed=1)
    whole = FEW(backbone, images, max_parallel=5)
    torch.testing.assert_close(FEW(backbone, images, max_parallel=2), whole)
    order = torch.tensor([4, 1, 0])
    torch.testing.assert_close(FEW(backbone, images[order], indices=order), whole[order])
    with torch.inference_mode():
        torch.testing.assert_close(FEW(backbone, images), whole)


def test_noise_belongs_to_seed_index_and_level() -> None:
    index = torch.tensor([5, 9])
    drawn = EPS(sigmas=(0.1, 0.2), seed=1).noise(index, SHAPE)
    assert drawn.shape == (2, 2, *SHAPE)
    assert torch.equal(EPS(sigmas=(0.3, 0.2, 0.1), seed=1).noise(index, SHAPE)[:, :2], drawn)
    assert torch.equal(EPS(sigmas=(0.1, 0.2), seed=1).noise(index.flip(0), SHAPE), drawn.flip(0))
    assert not torch.equal(EPS(sigmas=(0.1, 0.2), seed=2).noise(index, SHAPE), drawn)
    assert len({part.sum().item() for part in drawn.flatten(0, 1)}) == 4, "each level and image has its own"


def test_nothing_else_is_touched() -> None:
    backbone, images = Normal().train(), uniform(2, *SHAPE, seed=1).requires_grad_()
    state = torch.random.get_rng_state()
    found = FEW(backbone, images)
    assert not found.requires_grad
    assert images.grad is None
    assert backbone.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert FEW(backbone, images[:0]).shape == (0, *SHAPE)
    assert FEW(backbone, images.half()).dtype == torch.float32


class Smoothing(nn.Conv2d):
    """A backbone of a user, which takes images of its weights' type alone."""

    image_shape = SHAPE

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return self(noisy) / (1 + sigma)


def test_a_backbone_gets_images_of_its_own_type() -> None:
    backbone, images = Smoothing(3, 3, 3, padding=1), uniform(2, *SHAPE, seed=1)
    exact = FEW(backbone, images)
    found = FEW(backbone.bfloat16(), images)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_class_labels_reach_a_conditional_backbone() -> None:
    backbone, images = ConsistencyBackbone(Scaled(), SHAPE, num_classes=3), uniform(3, *SHAPE, seed=1)
    labels = torch.tensor([0, 2, 1])
    whole = FEW(backbone, images, class_labels=labels)
    parts = [FEW(backbone, images[i : i + 1], indices=[i], class_labels=labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(parts))
    torch.testing.assert_close(FEW(backbone, images, class_labels=labels, max_parallel=2), whole)
    assert not torch.equal(FEW(backbone, images, class_labels=labels.flip(0)), whole)
    with pytest.raises(InputValueError, match="class-conditional"):
        FEW(backbone, images)


@pytest.mark.parametrize("sigmas", [(), 0.1, "0.1", (0.1, 0.0), (float("nan"),), (0.1, True)])
def test_levels_that_are_none(sigmas: Any) -> None:
    with pytest.raises(SettingsError, match="sigmas"):
        EPS(sigmas=sigmas)


class Broken(Normal):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return self.output


@pytest.mark.parametrize(
    ("backbone", "images", "options", "error", "words"),
    [
        (ToyBackbone(SHAPE), uniform(2, *SHAPE, seed=0), {}, BackboneError, "denoise"),
        (Broken(torch.zeros(2, 3, 6, 8)), uniform(2, *SHAPE, seed=0), {}, BackboneError, "must return"),
        (Broken(torch.full((2, *SHAPE), math.nan)), uniform(2, *SHAPE, seed=0), {}, BackboneError, "NaN"),
        (Normal(), uniform(2, 3, 6, 8, seed=0), {}, InputValueError, "8 x 6"),
        (Normal(), 3 * uniform(2, *SHAPE, seed=0), {}, InputValueError, "0, 1"),
        (Normal(), uniform(2, *SHAPE, seed=0), {"indices": [1]}, InputValueError, "indices"),
        (Normal(), uniform(2, *SHAPE, seed=0), {"indices": [1.0, 2.0]}, InputTypeError, "indices"),
        (Normal(), uniform(2, *SHAPE, seed=0), {"class_labels": torch.zeros(2).long()}, InputValueError, "class"),
        (Normal(), uniform(2, *SHAPE, seed=0), {"max_parallel": 0}, SettingsError, "max_parallel"),
    ],
)
def test_mistakes(
    backbone: nn.Module, images: Tensor, options: dict[str, Any], error: type[CmapError], words: str
) -> None:
    with pytest.raises(error, match=words):
        FEW(backbone, images, **options)


def test_levels_that_the_backbone_does_not_know_are_refused() -> None:
    backbone = ConsistencyBackbone(Scaled(), SHAPE)
    with pytest.raises(InputValueError, match=r"0\.002 to 80"):
        EPS(sigmas=(0.1, 0.001))(backbone, uniform(2, *SHAPE, seed=0))
