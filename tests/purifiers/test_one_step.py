"""One-step purification: known answers on Gaussian data, its exact gradient, and its place in the wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attack_toys import labelled
from cmap_defense import CMAPSettings, PurifiedClassifier, ThreatModel, evaluate
from cmap_defense.attacks import PGD
from cmap_defense.errors import BackboneError, GradientError, SettingsError, WrongKindError
from cmap_defense.evaluation import Protocol
from cmap_defense.gradients import Implicit, StraightThrough, Unrolled
from cmap_defense.purifiers import CMAP, OneStep
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
MEAN, SPREAD = 0.1, 0.3


class GaussianDenoiser(nn.Module):
    """The denoiser of images whose pixels are independent, N(0.1, 0.3^2) in [-1, 1]; smooth, and known exactly."""

    image_shape = SHAPE

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return (SPREAD**2 * noisy + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


class CurvedDenoiser(GaussianDenoiser):
    """One with a gradient that depends on the image."""

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return torch.tanh(super().denoise(noisy, sigma) + 0.1 * noisy.flip(-1).sin())


class Classifier(nn.Module):
    """Smooth, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(4, 3 * 8 * 6, seed=5, dtype=torch.float64) / 4, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.weight.to(images).T)


def images_of(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.3 + 0.4 * uniform(count, *SHAPE, seed=1, dtype=dtype)


def model_of(purifier: Any = None, backbone: nn.Module | None = None, **options: Any) -> PurifiedClassifier:
    purifier = OneStep(level=0.5, n_latents=3) if purifier is None else purifier
    return PurifiedClassifier(Classifier(), backbone or CurvedDenoiser(), purifier=purifier, **options).eval()


@settings(max_examples=20, deadline=None)
@given(level=st.floats(0.05, 3.0))
def test_on_gaussian_data_mean_and_variance_are_known(level: float) -> None:
    images = images_of()
    count = 400
    found = OneStep(level=level, n_latents=count)(GaussianDenoiser(), images, seeds=torch.arange(2)).images
    found = 2 * found - 1
    shrinking = SPREAD**2 / (SPREAD**2 + level**2)
    spread = shrinking * level
    mean = shrinking * (2 * images - 1) + (1 - shrinking) * MEAN
    assert found.abs().max() < 1, "the clip would change the moments"
    assert ((found.mean(dim=1) - mean).abs() < 6 * spread / count**0.5).all()
    torch.testing.assert_close(found.std(dim=1).mean().item(), spread, rtol=0.01, atol=0)


def test_level_zero_gives_the_input_back() -> None:
    images = images_of()
    purifier = OneStep(level=0.0, n_latents=2)
    found = purifier(CurvedDenoiser(), images, seeds=torch.arange(2))
    assert torch.equal(found.images, images[:, None].expand(-1, 2, -1, -1, -1))
    assert purifier.passes == 0
    assert OneStep(level=0.1, n_latents=2).passes == 2


@pytest.mark.parametrize("max_parallel", [None, 1, 4])
def test_the_result_does_not_depend_on_batch_or_chunk(max_parallel: int | None) -> None:
    images, seeds = images_of(3), torch.tensor([7, 8, 9])
    purifier = OneStep(level=0.7, n_latents=3)
    whole = purifier(CurvedDenoiser(), images, seeds=seeds).images
    alone = purifier(CurvedDenoiser(), images[1:2], seeds=seeds[1:2], max_parallel=max_parallel).images
    torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=1e-12)
    assert not torch.equal(whole[0, 0], whole[0, 1])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("max_parallel", [None, 2])
def test_the_unrolled_gradient_is_that_of_finite_differences(max_parallel: int | None, train: bool) -> None:
    model = model_of(gradient=Unrolled(), seed=3, vote="soft", max_parallel=max_parallel).train(train)
    images = images_of().requires_grad_()
    loss = model(images)[:, 1].sum()
    (found,) = torch.autograd.grad(loss, images)
    step = 1e-5
    for place in ((0, 0, 2, 3), (1, 2, 7, 5), (1, 1, 0, 0)):
        ends = []
        for sign in (1, -1):
            moved = images.detach().clone()
            moved[place] += sign * step
            ends.append(model(moved)[:, 1].sum().item())
        assert found[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_the_other_gradient_modes() -> None:
    images = images_of().requires_grad_()
    straight, exact = (
        torch.autograd.grad(model_of(gradient=mode, seed=3, vote="soft")(images)[:, 1].sum(), images)[0]
        for mode in (StraightThrough(), Unrolled())
    )
    assert not torch.allclose(straight, exact)
    with pytest.raises(GradientError, match="optimisation over latents, which this purifier is not"):
        model_of(gradient=Implicit())(images)


def test_noise_may_be_given() -> None:
    images, given = images_of(), noise(2, 3, *SHAPE, seed=4, dtype=torch.float64)
    result = model_of().purify(images, latents=given)
    expected = CurvedDenoiser().denoise((2 * images - 1)[:, None] + 0.5 * given, 0.5)
    torch.testing.assert_close(result.images, (expected.clamp(-1, 1) + 1) / 2)
    assert result.history is None
    assert result.seeds is None


# --- the option purifier= of the wrapper ------------------------------------------------------------------------------


def test_cmap_is_the_default_and_its_settings_are_the_short_form() -> None:
    backbone, chosen = ToyBackbone(SHAPE), CMAPSettings(n_latents=2, iterations=3)
    long = PurifiedClassifier(Classifier(), backbone, purifier=CMAP(chosen))
    short = PurifiedClassifier(Classifier(), backbone, settings=chosen)
    assert long.settings == short.settings == chosen
    assert long.purifier == short.purifier
    assert PurifiedClassifier(Classifier(), backbone).purifier == CMAP()
    images = images_of(dtype=torch.float32)
    assert torch.equal(long(images, seeds=[1, 2]), short(images, seeds=[1, 2]))


def test_settings_and_purifier_together_are_refused() -> None:
    with pytest.raises(SettingsError, match="settings or purifier, not both"):
        model_of(settings=CMAPSettings())
    with pytest.raises(SettingsError, match=r"purifier must be an object such as CMAP\(\) or OneStep"):
        model_of("one-step")


def test_a_backbone_has_what_the_purifier_needs() -> None:
    with pytest.raises(BackboneError, match="CMAP needs a consistency model"):
        PurifiedClassifier(Classifier(), CurvedDenoiser())
    with pytest.raises(BackboneError, match=r"denoise\(noisy, sigma\)"):
        model_of(backbone=ToyBackbone(SHAPE))


def test_a_denoiser_by_name_is_for_another_purifier_than_cmap() -> None:
    with pytest.raises(WrongKindError, match=r"is a denoiser.*such as purifier=OneStep\(\)\.$"):
        PurifiedClassifier(nn.Flatten(), "fashion-mnist-edm")
    model = PurifiedClassifier(nn.Flatten(), "fashion-mnist-edm", purifier=OneStep(level=0.4))
    assert model(torch.rand(1, 1, 28, 28)).shape == (1, 784)


def test_the_noise_is_not_stronger_than_the_backbone_knows() -> None:
    model = PurifiedClassifier(nn.Flatten(), "fashion-mnist-ct", purifier=OneStep(level=81))
    with pytest.raises(SettingsError, match=r"OneStep.level must be at most 80.*but is 81"):
        model.purify(torch.rand(1, 1, 28, 28))


def test_what_belongs_to_the_optimisation_says_so() -> None:
    model = model_of()
    with pytest.raises(SettingsError, match=r"settings belongs to the optimisation .*which OneStep has not"):
        model.settings  # noqa: B018
    with pytest.raises(SettingsError, match="A latent hook belongs to the optimisation"):
        model.register_latent_hook(lambda state: None)


def test_variants_and_empty_batches_keep_the_purifier() -> None:
    model = model_of()
    assert model.variant(seed=1).purifier == model.purifier
    assert model.variant(purifier=OneStep(level=0.1)).purifier == OneStep(level=0.1)
    assert model(images_of()[:0]).shape == (0, 4)
    assert "OneStep(level=0.5, n_latents=3)" in repr(model)


def test_it_is_evaluated_under_an_attack_through_its_exact_gradient() -> None:
    data = labelled(3)
    model = model_of(backbone=_denoiser_of(data[0]))
    attack = PGD(ThreatModel(eps=0.1), steps=2, eot=2, gradient=Unrolled())
    protocol = Protocol(predictions=2, reevaluations=1, group=2, sanity_images=1, gradient_samples=2)
    report = evaluate(model, data, attacks={"exact": attack}, protocol=protocol, threads=1)
    assert report.row("exact").reevaluated.total == 3
    assert report.to_dict()["settings"]["models"]["defended"]["purifier"] == {
        "class": "OneStep",
        "level": 0.5,
        "n_latents": 3,
    }
    measured = 2 + 3  # once, for the memory of an image
    assert report.timings["defended/clean"].passes == 3 * 3 * (2 + 1 + 4) + measured


def _denoiser_of(images: Tensor) -> nn.Module:
    backbone = CurvedDenoiser()
    backbone.image_shape = tuple(images.shape[1:])  # pyright: ignore[reportAttributeAccessIssue]
    return backbone
