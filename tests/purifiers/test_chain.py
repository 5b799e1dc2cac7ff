"""Chains and pairs of backbones: independent noise, and for each purifier its own backbone and labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.common.passes import counting_passes
from cmap_defense.errors import SettingsError, WrongKindError
from cmap_defense.gradients import Surrogate
from cmap_defense.purifiers import CMAP, BackbonePair, Chain, DiffPure, OneStep
from denoisers import CMAP_QUICK, SHAPE, Classifier, CurvedDenoiser, GaussianDenoiser, images_of
from toys import ToyBackbone

DOUBLE = torch.float64


class Kept(GaussianDenoiser):
    """Gives its input back: what remains is the noise of all purifiers."""

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return noisy


class Conditional(ToyBackbone):
    """A generator that is conditioned on one of three classes."""

    num_classes = 3

    def generate(self, latents: Tensor, class_labels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.tanh(super().generate(latents) + 0.1 * class_labels[:, None, None, None])


@pytest.mark.parametrize("nested", [False, True])
def test_the_noise_of_all_purifiers_is_independent(nested: bool) -> None:
    """Equal noise in two of them would give a standard deviation of 2 s in place of sqrt(2) s."""
    parts = [OneStep(level=level, n_latents=1) for level in (0.01, 0.02, 0.02)]
    chain = Chain(Chain(*parts[:2]), parts[2]) if nested else Chain(*parts)
    grey = torch.full((64, *SHAPE), 0.5, dtype=DOUBLE)
    found = chain(Kept(), grey, seeds=torch.arange(64)).images
    expected = (0.01**2 + 2 * 0.02**2) ** 0.5 / 2
    assert found.std().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    "purifier",
    [OneStep(level=0.4, n_latents=2), DiffPure(t=3, n_latents=2), CMAP_QUICK],
    ids=["one-step", "sde", "cmap"],
)
def test_of_a_pair_one_alone_may_be_class_conditional(purifier: Any) -> None:
    class Three(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, :3]

    pair = BackbonePair(Conditional(SHAPE).double(), CurvedDenoiser())
    model = PurifiedClassifier(Three(), pair, purifier=purifier)
    result = model.purify(images_of(2), seeds=[1, 2], class_labels=[0, 2])
    assert result.images.shape == (2, 2, *SHAPE)
    if purifier is CMAP_QUICK:
        torch.testing.assert_close(model.generate(result.latents, class_labels=result.class_labels), result.images)


def test_passes_of_a_pair_are_counted_once() -> None:
    pair = BackbonePair(ToyBackbone(SHAPE).double(), CurvedDenoiser())
    model = PurifiedClassifier(Classifier(), pair, purifier=CMAP_QUICK)
    with counting_passes() as counter:
        model.generate(model.initial_latents(images_of(2)))
    assert counter.total == 4
    with counting_passes() as counter:
        model.purify(images_of(2))
    assert counter.total == 2 * CMAP_QUICK.passes, "without those that measure memory"


def test_a_surrogate_casts_to_the_precision_of_the_backbone() -> None:
    class Half(ToyBackbone):
        def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
            return self.generate(noisy)

    backbone = Half(SHAPE).bfloat16()
    model = PurifiedClassifier(
        Classifier(), backbone, settings=CMAP_QUICK.settings, gradient=Surrogate(), max_parallel=1
    )
    leaf = images_of(2, torch.float32).requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def test_what_belongs_to_latents_is_refused_by_other_purifiers() -> None:
    model = PurifiedClassifier(Classifier(), CurvedDenoiser(), purifier=OneStep(level=0.4))
    with pytest.raises(SettingsError, match="generate belongs to the optimisation over latents"):
        model.generate(torch.zeros(2, 4, *SHAPE, dtype=DOUBLE))


def test_direct_calls_check_the_kind_of_backbone() -> None:
    for purifier in (CMAP(CMAPSettings(n_latents=1, iterations=1)), Chain(DiffPure(t=2), CMAP_QUICK)):
        with pytest.raises(WrongKindError, match="consistency model"):
            purifier(CurvedDenoiser(), images_of(1), seeds=torch.tensor([1]))
