"""Backbones of a user, made of public names alone: evaluated like the package's own, and of the kind they say."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_toys import Linear, labelled
from cmap_defense import CMAPSettings, PurifiedClassifier, ThreatModel, evaluate
from cmap_defense.attacks import PGD, Transfer
from cmap_defense.backbones.base import kind_of
from cmap_defense.errors import BackboneError
from cmap_defense.evaluation import Protocol
from cmap_defense.gradients import StraightThrough, Unrolled
from cmap_defense.purifiers import CMAP, OneStep, Purifier

THREAT = ThreatModel(eps=0.1)
PROTOCOL = Protocol(predictions=3, reevaluations=3, seeds=(0,), group=12, sanity_images=12, gradient_samples=4)


class GaussianPixels(nn.Module):
    """The consistency function of independent normal pixels, in closed form."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.image_shape = tuple(mean.shape)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        level = torch.as_tensor(sigma).to(noisy).reshape(-1, 1, 1, 1)
        return self.mean + self.std / (self.std**2 + level**2).sqrt() * (noisy - self.mean)

    def generate(self, latents: Tensor) -> Tensor:
        return self.denoise(80 * latents, 80.0).clamp(-1, 1)


class GaussianPosterior(GaussianPixels):
    """The mean of all clean images behind a noisy one, for the same pixels; it inherits a ``generate`` that is none."""

    kind = "denoiser"

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        level = torch.as_tensor(sigma).to(noisy).reshape(-1, 1, 1, 1)
        return self.mean + self.std**2 / (self.std**2 + level**2) * (noisy - self.mean)


def own(kind: type[nn.Module]) -> Any:
    images = 2 * labelled(12)[0] - 1
    return kind(images.mean(dim=0), images.std(dim=0))


@pytest.mark.parametrize(
    ("kind", "purifier", "gradient"),
    [
        (GaussianPosterior, OneStep(level=0.3, n_latents=2), Unrolled()),
        (
            GaussianPixels,
            CMAP(CMAPSettings(n_latents=2, iterations=6, learning_rate=0.4, latent_weight=0.0)),
            StraightThrough(),
        ),
    ],
)
def test_a_backbone_of_a_user_is_evaluated_and_earns_a_headline(
    kind: type[nn.Module], purifier: Purifier, gradient: Any
) -> None:
    model = PurifiedClassifier(Linear(), own(kind), purifier=purifier).eval()
    report = evaluate(
        model,
        labelled(12),
        attacks={"pgd": PGD(THREAT, steps=6, eot=1, gradient=gradient), "transfer": Transfer(PGD(THREAT, steps=4))},
        protocol=PROTOCOL,
        threads=1,
    )
    print(report.refused)
    assert report.refused == []
    assert report.headline is not None


class Bare(nn.Module):
    """A backbone that says nothing of its kind."""

    image_shape = (3, 8, 6)


def method(module: nn.Module, images: Tensor, *_: Any) -> Tensor:
    return images


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"generate": method}, "consistency"),
        ({"generate": method, "denoise": method}, "consistency"),
        ({"denoise": method}, "denoiser"),
        ({"generate": method, "denoise": method, "kind": "denoiser"}, "denoiser"),
    ],
)
def test_kind_follows_from_the_methods_unless_it_is_given(members: dict[str, Any], expected: str) -> None:
    backbone = type("Own", (Bare,), members)()
    assert kind_of(backbone) == expected
    if "denoise" in members:
        PurifiedClassifier(Linear(), backbone, purifier=OneStep(level=0.3))
    if expected == "consistency":
        PurifiedClassifier(Linear(), backbone)
    else:
        with pytest.raises(BackboneError, match="CMAP needs a consistency model, but Own is a denoiser"):
            PurifiedClassifier(Linear(), backbone)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(BackboneError, match=r'kind must be "consistency" or "denoiser", but Own has .flow.'):
        PurifiedClassifier(Linear(), type("Own", (Bare,), {"generate": method, "kind": "flow"})())
