"""Variants that share their weights, and the parts that attacks use: the classifier, the denoiser, labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import CLASSES, QUICK, SHAPE, Denoiser, Linear, labelled, linear, wrapped
from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.errors import InputTypeError, InputValueError, SettingsError
from cmap_defense.gradients import Detached, Implicit, StraightThrough, Unrolled
from toys import ToyBackbone, noise, uniform

OPTIONS: dict[str, Any] = {
    "settings": CMAPSettings(n_latents=4, iterations=2),
    "normalize": ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
    "resize": "area",
    "vote": "soft",
    "seed": 9,
    "gradient": Unrolled(last=2),
    "max_parallel": 3,
    "out_of_range": "clamp",
}


def options_of(model: PurifiedClassifier) -> dict[str, Any]:
    """What a wrapper was made with, as far as it can be seen."""
    norm = model.preprocessing.normalisation
    return {
        "settings": model.settings,
        "normalize": None if norm is None else (norm.mean, norm.std),
        "inputs": model.preprocessing.inputs,
        "resize": model.preprocessing.resize,
        "vote": model.vote,
        "seed": model.seed,
        "gradient": model.gradient,
        "class_labels": model.class_labels,
        "max_parallel": model.max_parallel,
        "out_of_range": model.preprocessing.out_of_range,
    }


# ------------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("name", OPTIONS)
def test_one_option_is_changed_and_the_others_are_kept(name: str):
    plain = wrapped()
    changed = options_of(plain.variant(**{name: OPTIONS[name]}))
    assert changed == options_of(plain) | {name: OPTIONS[name]}
    full = wrapped(**OPTIONS)
    original = {"settings": QUICK, "gradient": StraightThrough(), "vote": "label", "out_of_range": "auto"}.get(name)
    back = options_of(full.variant(**{name: original}))
    assert back == options_of(full) | {name: original}


def test_without_changes_it_is_the_same_model_again():
    images, _ = labelled()
    for model in (wrapped(), wrapped(**OPTIONS), wrapped(**OPTIONS, inputs="normalized", class_labels="spread")):
        other = model.variant()
        assert other is not model
        assert options_of(other) == options_of(model)
        mean, std = (torch.tensor(part)[:, None, None] for part in OPTIONS["normalize"])
        shown = images if model.preprocessing.inputs == "unit" else (images - mean) / std
        with torch.no_grad():
            assert torch.equal(other(shown, seeds=[1, 2, 3]), model(shown, seeds=[1, 2, 3]))


def test_parts_are_shared_and_weights_that_change_change_both():
    model = wrapped()
    other = model.variant(vote="soft")
    assert other.classifier is model.classifier
    assert other.backbone is model.backbone
    images, _ = labelled()
    with torch.no_grad():
        before = other(images, seeds=[1, 2, 3])
        model.classifier.weight.mul_(2)  # pyright: ignore
        after = other(images, seeds=[1, 2, 3])
    assert (after - before).abs().max() > 1e-2


def test_the_original_is_left_alone():
    model = wrapped(seed=3)
    before, images = options_of(model), labelled()[0]
    with torch.no_grad():
        expected = model(images)
        other = model.variant(settings=QUICK.replace(iterations=9), seed=4, gradient=Detached())
        assert not torch.equal(other(images), expected)
        assert torch.equal(model(images), expected)
    assert options_of(model) == before


@pytest.mark.parametrize("train", [True, False])
def test_modes_are_kept(train: bool):
    model = wrapped(classifier=torch.nn.Sequential(Linear(), torch.nn.Dropout(0.1))).train(train)
    model.classifier[1].train(not train)  # pyright: ignore
    other = model.variant(seed=1)
    assert other.training == train
    assert other.classifier[0].training == train  # pyright: ignore
    assert other.classifier[1].training != train  # pyright: ignore
    assert not other.backbone.training
    assert model.training == train


def test_hooks_stay_with_their_owner():
    model, seen = wrapped(seed=0), []
    model.register_step_hook(lambda state: seen.append(state.iteration))
    other = model.variant(gradient=Unrolled())
    other(labelled()[0])
    assert seen == []
    live: list[int] = []
    other.register_step_hook(lambda state: live.append(state.iteration), live=True)
    model(labelled()[0])
    assert seen == [0, 1, 2]
    assert live == []


def test_gradients_of_a_variant_are_its_own_modes():
    images, labels = labelled()

    def gradient(model: PurifiedClassifier) -> Tensor:
        leaf = images.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(leaf, seeds=[1, 2, 3]), labels)
        return torch.autograd.grad(loss, leaf)[0]

    modes = (StraightThrough(), Unrolled(), Implicit(damping=30.0))
    made = [gradient(wrapped().variant(gradient=mode)) for mode in modes]
    expected = [gradient(wrapped(gradient=mode)) for mode in modes]
    for first, second in zip(made, expected, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(made[0], made[1])


def test_variants_of_variants():
    model = wrapped().variant(seed=1).variant(vote="soft").variant(seed=2)
    assert options_of(model) == options_of(wrapped(seed=2, vote="soft"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 5}, "no option 'iterations'"),
        ({"gradients": Unrolled()}, r"Did you mean PurifiedClassifier\(..., gradient="),
        ({"classifier": Linear()}, "no option 'classifier'"),
        ({"backbone": Denoiser()}, "no option 'backbone'"),
        ({"vote": "hard"}, "vote"),
        ({"settings": {"iterations": 3}}, "settings"),
        ({"inputs": "normalized"}, "normalize"),
        ({"max_parallel": 0}, "max_parallel"),
    ],
)
def test_changes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        wrapped().variant(**changes)


# -------------------------------------------------------------------------------------------- the undefended classifier


def test_undefended_is_the_classifier_on_the_images_as_they_come():
    images, _ = labelled()
    torch.testing.assert_close(wrapped().undefended(images), linear(images))
    mean, std = 0.4, 0.25
    for inputs in ("unit", "normalized"):
        model = wrapped(normalize=(mean, std), inputs=inputs)
        given = images if inputs == "unit" else (images - mean) / std
        torch.testing.assert_close(model.undefended(given), linear((images - mean) / std), rtol=1e-5, atol=1e-5)


def test_undefended_is_differentiable_and_draws_no_noise():
    images, labels = labelled()
    leaf = images.clone().requires_grad_()
    before = torch.get_rng_state()
    loss = torch.nn.functional.cross_entropy(wrapped(gradient=Detached()).undefended(leaf), labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(linear(leaf), labels), leaf)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_undefended_checks_its_images_unless_told_not_to():
    model = wrapped()
    images, _ = labelled()
    beyond = 3 * images - 1
    for wrong in (beyond, images / 0):
        with pytest.raises(InputValueError):
            model.undefended(wrong)
    with pytest.raises(InputTypeError):
        model.undefended((images * 255).to(torch.uint8))
    with pytest.raises(InputValueError, match="8 x 6"):
        model.undefended(images[..., :5])
    torch.testing.assert_close(model.undefended(beyond, check=False), linear(beyond))
    model, expected = wrapped(normalize=(0.4, 0.25), inputs="normalized"), linear((images - 0.4) / 0.25)
    torch.testing.assert_close(model.undefended(images, check=False), expected, rtol=1e-5, atol=1e-5)


def test_undefended_of_another_size_shows_that_size():
    seen: list[tuple[int, ...]] = []

    def classifier(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return images.mean(dim=(2, 3))

    wrapped(classifier=classifier, resize=True).undefended(uniform(2, 3, 13, 11, seed=1))
    assert seen == [(2, 3, 13, 11)]


# --------------------------------------------------------------------------------------------------------- the denoiser


class Conditional(ToyBackbone):
    """Adds an image of its own for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.register_buffer("offsets", noise(CLASSES, *SHAPE, seed=9))

    def generate(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return torch.tanh(super().generate(latents) + self.offsets[class_labels])  # pyright: ignore

    def denoise(self, noisy: Tensor, sigma: float, class_labels: Tensor) -> Tensor:
        return self.generate(noisy / (1 + sigma), class_labels)


def test_denoiser_is_the_backbones_image_by_image():
    noisy = noise(2, 3, *SHAPE, seed=3)
    denoise = wrapped().denoiser()
    assert denoise is not None
    expected = torch.stack([Denoiser().denoise(part, 0.7) for part in noisy])
    torch.testing.assert_close(denoise(noisy, 0.7), expected)
    assert (denoise(noisy, 0.7) - denoise(noisy, 0.1)).abs().max() > 1e-2


def test_denoiser_of_a_conditional_backbone_has_the_label_of_each():
    noisy, labels = noise(2, 3, *SHAPE, seed=3), torch.tensor([[0, 1, 2], [3, 3, 0]])
    model = wrapped(backbone=Conditional())
    denoise = model.denoiser(labels)
    assert denoise is not None
    made = denoise(noisy, 0.5)
    for image in range(2):
        for place in range(3):
            alone = model.backbone.denoise(noisy[image, place][None], 0.5, labels[image, place][None])  # pyright: ignore
            torch.testing.assert_close(made[image, place], alone[0])


def test_where_there_is_no_denoise_there_is_no_denoiser():
    assert wrapped(backbone=ToyBackbone()).denoiser() is None


# ----------------------------------------------------------------------------------------------------------- the labels


def test_latent_class_labels_are_those_of_a_purification():
    images, _ = labelled(5)
    for choice in ("predicted", "spread", lambda shown: torch.arange(len(shown)) % CLASSES):
        model = wrapped(backbone=Conditional(), class_labels=choice, settings=QUICK.replace(n_latents=3))
        labels = model.latent_class_labels(images)
        assert labels is not None
        assert labels.shape == (5, 3)
        assert torch.equal(labels, model.purify(images, seeds=range(5)).class_labels)  # pyright: ignore
    logits = linear(images)
    predicted = wrapped(backbone=Conditional()).latent_class_labels(images)
    assert torch.equal(predicted, logits.argmax(dim=1)[:, None].expand(-1, 2))  # pyright: ignore
    spread = wrapped(backbone=Conditional(), class_labels="spread").latent_class_labels(images)
    assert torch.equal(spread, logits.topk(2, dim=1).indices)  # pyright: ignore


def test_latent_class_labels_of_normalised_images_are_predicted_on_them():
    images, _ = labelled(5)
    model = wrapped(backbone=Conditional(), normalize=(0.4, 0.25), inputs="normalized")
    labels = model.latent_class_labels((images - 0.4) / 0.25)
    assert torch.equal(labels[:, 0], linear((images - 0.4) / 0.25).argmax(dim=1))  # pyright: ignore


def test_an_unconditional_backbone_and_no_images_have_no_latent_class_labels():
    labels = wrapped(backbone=Conditional()).latent_class_labels(labelled()[0][:0])
    assert labels is not None
    assert labels.shape == (0, 2)
    assert wrapped().latent_class_labels(labelled()[0]) is None
    assert wrapped(class_labels="spread").latent_class_labels(labelled()[0]) is None


# ------------------------------------------------------------------------------------------------------ generate(size=)


def test_generate_at_another_size_is_what_a_purification_shows():
    model = wrapped(resize="bilinear")
    images, _ = labelled(2, (13, 11))
    result = model.purify(images, seeds=[1, 2])
    large = model.generate(result.latents, size=(13, 11))
    torch.testing.assert_close(large, result.images, rtol=0, atol=1e-6)
    small = model.generate(result.latents)
    assert small.shape == (2, 2, *SHAPE)
    expected = torch.nn.functional.interpolate(
        small.flatten(0, 1), (13, 11), mode="bilinear", antialias=True, align_corners=False
    )
    torch.testing.assert_close(large, expected.unflatten(0, (2, 2)))
    torch.testing.assert_close(model.generate(result.latents, size=SHAPE[1:]), small, rtol=0, atol=0)
    torch.testing.assert_close(model.classify_latents(result.latents, size=(13, 11)), result.logits)
    other = model.classify_latents(result.latents, size=(4, 3))
    assert (model.classify_latents(result.latents) - other).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area"])
def test_generate_at_another_size_is_differentiable_and_stays_in_the_cube(mode: str):
    model = wrapped(resize=mode)
    latents = (3 * noise(2, 2, *SHAPE, seed=5)).requires_grad_()
    images = model.generate(latents, size=(13, 11))
    assert images.min() >= 0
    assert images.max() <= 1
    (gradient,) = torch.autograd.grad(images.square().sum(), latents)
    assert (gradient.flatten(2).abs().sum(dim=2) > 0).all()


def test_a_size_that_cannot_be_given_is_refused():
    with pytest.raises(InputValueError, match="does not resize: make it with resize=True"):
        wrapped().generate(noise(2, 2, *SHAPE, seed=5), size=(13, 11))
