"""One-step purification: known answers on Gaussian data, its exact gradient, and its place in the wrapper."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attack_toys import labelled
from cmap_defense import CMAPSettings, PurifiedClassifier, ThreatModel, evaluate
from cmap_defense.attacks import PGD
from cmap_defense.errors import BackboneError, SettingsError, WrongKindError
from cmap_defense.evaluation import Protocol
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import CMAP, OneStep
from denoisers import DOUBLE, MEAN, SHAPE, SPREAD, Classifier, CurvedDenoiser, GaussianDenoiser, images_of
from toys import ToyBackbone, noise


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


def test_noise_may_be_given() -> None:
    images, given = images_of(), noise(2, 3, *SHAPE, seed=4, dtype=DOUBLE)
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
    with pytest.raises(SettingsError, match="Give settings, purifier or preset, one of them"):
        model_of(settings=CMAPSettings())
    with pytest.raises(SettingsError, match=r"purifier must be an object such as CMAP\(\) or OneStep"):
        model_of("one-step")


def test_a_backbone_has_what_the_purifier_needs() -> None:
    with pytest.raises(BackboneError, match="CMAP needs a consistency model"):
        PurifiedClassifier(Classifier(), CurvedDenoiser())
    with pytest.raises(BackboneError, match=r"denoise\(noisy, sigma\)"):
        model_of(backbone=ToyBackbone(SHAPE))


def test_a_denoiser_by_name_is_for_another_purifier_than_cmap() -> None:
    with pytest.raises(WrongKindError, match=r"is a denoiser.*such as OneStep \(--purifier one-step\)\.$"):
        PurifiedClassifier(nn.Flatten(), "fashion-mnist-edm", purifier=CMAP())
    model = PurifiedClassifier(nn.Flatten(), "fashion-mnist-edm", purifier=OneStep(level=0.4))
    assert model(torch.rand(1, 1, 28, 28)).shape == (1, 784)


def test_the_noise_is_not_stronger_than_the_backbone_knows() -> None:
    with pytest.raises(SettingsError, match=r"OneStep.level is 81, but the backbone was trained for levels up to 80:"):
        PurifiedClassifier(nn.Flatten(), "fashion-mnist-ct", purifier=OneStep(level=81))


def test_it_is_evaluated_under_an_attack_through_its_exact_gradient() -> None:
    data = labelled(3)
    model = model_of(backbone=_denoiser_of(data[0]))
    attack = PGD(ThreatModel(eps=0.1), steps=2, eot=2, gradient=Unrolled())
    protocol = Protocol(predictions=2, reevaluations=1, group=2, sanity_images=1, gradient_samples=2)
    report = evaluate(model, data, attacks={"exact": attack}, protocol=protocol, threads=1)
    assert report.row("exact").reevaluated.total == 3
    assert report.to_dict()["settings"]["models"]["defended"]["purifier"] == {
        "class": "cmap_defense.purifiers.one_step.OneStep",
        "level": 0.5,
        "n_latents": 3,
    }
    assert report.timings["defended/clean"].passes == 3 * 3 * (2 + 1 + 4)


def _denoiser_of(images: Tensor) -> nn.Module:
    backbone = CurvedDenoiser()
    backbone.image_shape = tuple(images.shape[1:])  # pyright: ignore[reportAttributeAccessIssue]
    return backbone
