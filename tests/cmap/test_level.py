"""Latents at a noise level around the input: the loop against a plain one, gradients against finite differences."""

import pytest
import torch
from torch import Tensor

from cmap_defense import CMAP, CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import LatentAttack, ThreatModel
from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.cmap.losses import combine_terms, latent_term, perceptual_terms
from cmap_defense.cmap.objective import LatentObjective, around_inputs
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.errors import BackboneError, InputValueError, SettingsError
from cmap_defense.gradients import Implicit, StraightThrough, Unrolled
from cmap_defense.purifiers import OneStep
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
B, K, LEVEL = 2, 3, 0.7
DOUBLE = torch.float64


class Restoring(ToyBackbone):
    """A toy with ``denoise``, which depends on the noise level and leaves [-1, 1] now and then."""

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return 1.1 * self.generate(noisy / (1 + sigma))


BACKBONE = Restoring(SHAPE).double().requires_grad_(False)
IMAGES = uniform(B, *SHAPE, seed=5, dtype=DOUBLE)
START = noise(B, K, *SHAPE, seed=3, dtype=DOUBLE)
WEIGHTS = noise(B, K, *SHAPE, seed=9, dtype=DOUBLE)
DIRECTION = noise(B, *SHAPE, seed=11, dtype=DOUBLE)
SETTINGS = CMAPSettings(n_latents=K, iterations=4, learning_rate=0.05, level=LEVEL, l1_smoothing=0.05)


def classify(images: Tensor) -> Tensor:
    """Three logits, linear in the images."""
    return images.flatten(1) @ noise(images[0].numel(), 3, seed=2, dtype=DOUBLE).to(images.dtype)


def wrapped(settings: CMAPSettings = SETTINGS, **options: object) -> PurifiedClassifier:
    return PurifiedClassifier(classify, BACKBONE, settings=settings, **options)  # pyright: ignore[reportArgumentType]


def by_hand(images: Tensor, settings: CMAPSettings) -> Tensor:
    """The purified images [B, K, C, H, W] in [0, 1] by torch's Adam and autograd, image by image."""
    purified = []
    for image, start in zip(images, START, strict=True):
        latents = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([latents], lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
        clean = image.expand(K, *SHAPE)

        def shown(latents: Tensor, clean: Tensor = clean) -> Tensor:
            return BACKBONE.denoise(2 * clean - 1 + LEVEL * latents, LEVEL).clamp(-1, 1)

        for _ in range(settings.iterations):
            l1, ssim = perceptual_terms(shown(latents), SSIMReference.of(clean), settings.l1_smoothing)
            terms = combine_terms(l1[None], ssim[None], latent_term(latents[None]), settings)
            optimiser.zero_grad()
            (K * terms.total).sum().backward()
            optimiser.step()
        purified.append((shown(latents).detach() + 1) / 2)
    return torch.stack(purified)


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_loop_is_a_plain_adam_on_the_restored_images(chunk: int | None) -> None:
    result = wrapped(max_parallel=chunk).purify(IMAGES, latents=START)
    torch.testing.assert_close(result.images, by_hand(IMAGES, SETTINGS), rtol=1e-9, atol=1e-9)


def test_without_steps_it_is_one_step_purification() -> None:
    settings = SETTINGS.replace(iterations=0)
    searched = wrapped(settings).purify(IMAGES, seeds=[4, 5])
    one = PurifiedClassifier(classify, BACKBONE, purifier=OneStep(level=LEVEL, n_latents=K)).purify(
        IMAGES, seeds=[4, 5]
    )
    torch.testing.assert_close(searched.images, one.images)
    assert searched.history is not None
    assert searched.history.total.shape == (0, B)
    assert CMAP(settings).passes == K
    leaf, gradients = IMAGES.clone().requires_grad_(), []
    for purifier in (CMAP(settings), OneStep(level=LEVEL, n_latents=K)):
        model = PurifiedClassifier(classify, BACKBONE, purifier=purifier, gradient=Unrolled())
        gradients.append(torch.autograd.grad((model.purify(leaf, seeds=[4, 5]).images * WEIGHTS).sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_unrolled_gradient_agrees_with_finite_differences(checkpoint: bool, chunk: int | None) -> None:
    """The input is seen three ways: by the loss, by the generator in each step, and by the generator at the end."""
    model = wrapped(gradient=Unrolled(checkpoint=checkpoint), max_parallel=chunk)
    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model.purify(leaf, latents=START).images * WEIGHTS).sum(), leaf)
    h = 1e-6
    ends = [(model.purify(IMAGES + s * h * DIRECTION, latents=START).images * WEIGHTS).sum().item() for s in (1, -1)]
    assert (gradient * DIRECTION).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("chunk", [None, 4])
def test_second_derivatives_are_differences_of_gradients(chunk: int | None) -> None:
    """The exact and the implicit gradient are made of these products."""
    generate, h = around_inputs(BACKBONE.denoise, LEVEL), 1e-6

    def gradient(images: Tensor, latents: Tensor) -> Tensor:
        return LatentObjective(generate, images, K, SETTINGS, max_parallel=chunk).gradient(latents)[1]

    objective = LatentObjective(generate, IMAGES, K, SETTINGS, max_parallel=chunk)
    product, mixed = objective.products(START, WEIGHTS, l1_smoothing=0.0)
    up, down = (gradient(IMAGES, START + s * h * WEIGHTS) for s in (1, -1))
    torch.testing.assert_close(product, (up - down) / (2 * h), rtol=1e-5, atol=1e-5)
    up, down = (gradient(IMAGES + s * h * DIRECTION, START) for s in (1, -1))
    torch.testing.assert_close((mixed * DIRECTION).sum(), ((up - down) / (2 * h) * WEIGHTS).sum(), rtol=1e-5, atol=1e-5)


def test_the_implicit_gradient_has_the_part_of_the_generator() -> None:
    """With an infinite damping the latents do not move: what is left is the input of the generator."""
    model = wrapped(gradient=Implicit(damping=1e12))
    leaf = IMAGES.clone().requires_grad_()
    result = model.purify(leaf, latents=START)
    (gradient,) = torch.autograd.grad((result.images * WEIGHTS).sum(), leaf)
    direct = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad((model.generate(result.latents.detach(), direct) * WEIGHTS).sum(), direct)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_the_public_pieces_agree_with_a_purification() -> None:
    model = wrapped()
    result = model.purify(IMAGES, latents=START)
    assert result.history is not None
    torch.testing.assert_close(model.generate(result.latents, IMAGES), result.images)
    torch.testing.assert_close(model.classify_latents(result.latents, IMAGES), result.logits)
    assert torch.equal(model.forward_from_latents(result.latents, IMAGES).argmax(dim=1), result.labels)
    torch.testing.assert_close(model.objective(START, IMAGES).total, result.history.total[0])
    with pytest.raises(InputValueError, match="give \\[2, C, H, W\\] after the latents"):
        model.generate(result.latents)


def test_an_attack_on_latents_searches_around_the_clean_images() -> None:
    """A classifier that is wrong about nothing near the input: what is submitted is G of latents around it."""
    attack = LatentAttack(ThreatModel(eps=0.9), steps=1, latents=2, start="noise")
    model = wrapped(seed=1)
    labels = model(IMAGES).argmax(dim=1)
    first, other = attack(model, IMAGES, labels), attack(model, 1 - IMAGES, labels)
    assert (first.images - other.images).abs().max() > 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"level": None, "iterations": 0}, "iterations must be at least 1"),
        ({"level": 1.0, "iterations": -1}, "iterations must be at least 0"),
    ],
)
def test_settings_out_of_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CMAPSettings(**values)  # pyright: ignore[reportArgumentType]


def test_a_level_needs_denoise_of_that_level() -> None:
    with pytest.raises(BackboneError, match="denoise"):
        PurifiedClassifier(classify, ToyBackbone(SHAPE), settings=SETTINGS)
    limited = Restoring(SHAPE)
    limited.noise = NoiseRange(sigma_max=0.5)
    with pytest.raises(SettingsError, match=r"CMAP\.level is 0\.7, but the backbone was trained for levels up to 0\.5"):
        PurifiedClassifier(classify, limited, settings=SETTINGS)
    with pytest.raises(SettingsError, match="choose a lower level"):
        CMAP(SETTINGS)(limited, IMAGES.float(), seeds=torch.arange(B))


def test_settings_round_trip_and_the_default_is_the_method_of_the_paper() -> None:
    assert CMAPSettings().level is None
    assert CMAPSettings.from_json(SETTINGS.to_json()) == SETTINGS
    assert CMAP(CMAPSettings()).needs == "generate"
    assert wrapped(gradient=StraightThrough()).settings == SETTINGS
