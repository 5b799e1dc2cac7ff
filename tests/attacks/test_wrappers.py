"""Every kind of wrapped model: normalised inputs, other sizes, class labels, plain functions, fixed seeds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import (
    CLASSES,
    EVERY,
    NAMES,
    QUICK,
    SHAPE,
    THREATS,
    Denoiser,
    attempts_of,
    labelled,
    linear,
    reevaluation_seeds,
    suite,
    wrapped,
)
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD, AttackResult, Goal
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.gradients import StraightThrough, Surrogate, Unrolled
from cmap_defense.purifiers import DiffPure, OneStep
from toys import ToyBackbone, noise

ON_LATENTS = pytest.mark.parametrize("name", [name for name in NAMES if "Latent" in name or "Disruption" in name])
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def assert_reevaluated(model: PurifiedClassifier, result: AttackResult, images: Tensor, *, seeded: bool = True) -> None:
    """The first re-evaluation of two images by hand."""
    seeds = reevaluation_seeds(range(2), 5, 1 + attempts_of(result)) if seeded else None
    with torch.no_grad():
        assert torch.equal(model(images, seeds=seeds).argmax(dim=1), result.predictions[0])


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


SEARCHES = ("PGD", "PGD all options", "PGD unrolled", "SPSA", "ShortCMAP", "Transfer shortened", "TargetSteer")


@pytest.mark.parametrize("name", SEARCHES)
def test_every_purification_of_a_search_has_the_hooks(name: str):
    """Those of the search too, in other modes and with other settings; but a search of latents has none."""
    model, seen = wrapped(), []
    model.register_step_hook(lambda state: seen.append(state.iteration), steps=[0])
    result = suite(THREATS["linf"], seed=5)[name](model, *labelled(2))
    assert len(seen) == result.queries - (name == "TargetSteer")


@pytest.mark.parametrize("gradient", [None, Unrolled(), StraightThrough(), Surrogate()], ids=str)
@pytest.mark.parametrize(
    "purifier", [OneStep(level=0.3, n_latents=2), DiffPure(t=20, step=0.01, n_latents=2)], ids=repr
)
@pytest.mark.parametrize("inputs", ["unit", "normalized"])
def test_images_that_a_hook_replaces_are_part_of_the_defence_that_is_searched(gradient, purifier, inputs: str):
    """Behind every purifier, in each gradient mode, and with normalised images."""
    images, labels = labelled(2)
    backbone = Denoiser()
    backbone.kind = purifier.kind or "consistency"
    model = wrapped(settings=None, backbone=backbone, purifier=purifier, normalize=(MEAN, STD), inputs=inputs)
    attack = PGD(THREATS["linf"], steps=2, gradient=gradient, seed=5)
    without = attack(model, images, labels)
    calls: list[int] = []

    def darker(state: Any) -> Tensor:
        calls.append(state.step)
        return 0.25 * state.images

    model.register_step_hook(darker, live=isinstance(gradient or model.gradient, Unrolled))
    found = attack(model, images, labels)
    assert len(calls) == found.queries * len({*calls})
    assert (found.history["loss"] - without.history["loss"]).abs().max() > 1e-3


@EVERY
@pytest.mark.parametrize("options", [{}, {"vote": "soft", "seed": 4}], ids=["plain", "soft"])
def test_a_wrapper_of_normalised_images_is_attacked_in_the_unit_cube(name: str, options: dict[str, Any]):
    """Its hooks are part of the defence as well."""
    images, labels = labelled(2)
    results, calls = [], []
    for kind in ("normalized", "unit"):
        model, seen = wrapped(normalize=(MEAN, STD), inputs=kind, **options), []
        model.register_step_hook(lambda state, seen=seen: seen.append(state.iteration))
        results.append(suite(THREATS["l2"], seed=5)[name](model, images, labels, reevaluations=2))
        calls.append(seen)
        assert model.preprocessing.inputs == kind
    first, second = results
    assert calls[0] == calls[1] != []
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.predictions, second.predictions)
    assert torch.equal(first.candidates, second.candidates)
    assert first.queries == second.queries
    for column, values in first.history.items():
        assert torch.equal(values, second.history[column])
    assert first.images.min() >= 0
    assert first.images.max() <= 1
    model = wrapped(normalize=(MEAN, STD), inputs="normalized", **options)
    assert_reevaluated(model, first, normalised(first.images), seeded="seed" not in options)


@EVERY
@pytest.mark.parametrize(("size", "mode"), [((13, 11), "bilinear"), ((5, 12), "bicubic")])
def test_images_of_another_size(name: str, size: tuple[int, int], mode: str):
    result = suite(THREATS["linf"], seed=5)[name](wrapped(resize=mode), *labelled(2, size))
    assert result.images.shape == (2, 3, *size)
    assert result.candidates.shape[2:] == (3, *size)
    assert (result.distance <= THREATS["linf"].eps * (1 + 1e-6)).all()
    assert (result.distance > 0).all()
    assert_reevaluated(wrapped(resize=mode), result, result.images)


class Recording(ToyBackbone):
    """Keeps what it generates."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def generate(self, latents: Tensor) -> Tensor:
        images = super().generate(latents)
        self.made.append(images.detach())
        return images


@ON_LATENTS
@pytest.mark.parametrize("size", [None, (13, 11)])
def test_what_is_submitted_was_generated_and_then_resized(name: str, size: tuple[int, int] | None):
    """With eps = 1 nothing needs to be projected, so each attempt is an image of the generator's, to the last bit."""
    images, labels = labelled(2, size or SHAPE[1:])
    backbone = Recording()
    model = wrapped(backbone=backbone, resize=None if size is None else "bilinear")
    threat = THREATS["linf"].replace(eps=1.0)
    attack = suite(threat)[name]
    found = attack.run(Oracle(model, torch.arange(2)), images, Goal(labels))
    made = (torch.cat([part for part in backbone.made if len(part) >= 2]).clamp(-1, 1) + 1) / 2
    if size is not None:
        made = model.preprocessing.resized(made, size)
    for attempt in found.images.flatten(0, 1):
        assert (attempt - made).abs().flatten(1).amax(dim=1).min() < 1e-6


class Conditional(ToyBackbone):
    """Adds an image of its own for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.register_buffer("offsets", 0.5 * noise(CLASSES, *SHAPE, seed=9))

    def generate(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return torch.tanh(super().generate(latents) + self.offsets[class_labels])

    def denoise(self, noisy: Tensor, sigma: float, class_labels: Tensor) -> Tensor:
        return self.generate(noisy / (1 + sigma), class_labels)


class Baked(Conditional):
    """The same without a word of classes: it knows the label of each latent by its place among all of them."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.num_classes = None
        both = labels.repeat(1, 2)
        self.tables = {part.numel(): part.flatten() for part in (labels[:, :1], labels, both)}

    def generate(self, latents: Tensor) -> Tensor:
        return super().generate(latents, self.tables.get(len(latents), torch.zeros(len(latents), dtype=torch.int64)))

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return self.generate(noisy / (1 + sigma))


@EVERY
def test_each_latent_is_searched_under_the_class_that_was_chosen_for_it(name: str):
    """Five images, two latents each; against a backbone that has the labels built in."""
    (images, labels), count = labelled(5), 3 if name == "LatentAttack from noise" else 2
    chosen = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 2, 0], [1, 3, 3], [0, 0, 1]])[:, :count]
    settings = QUICK.replace(n_latents=count)
    models = [
        wrapped(backbone=Conditional(), class_labels=lambda images: chosen[: len(images)], settings=settings),
        wrapped(backbone=Baked(chosen), settings=settings),
    ]
    first, second = (suite(THREATS["linf"], seed=5)[name](model, images, labels, reevaluations=2) for model in models)
    torch.testing.assert_close(first.candidates, second.candidates, rtol=0, atol=1e-6)
    assert torch.equal(first.predictions, second.predictions)
    for column, values in first.history.items():
        torch.testing.assert_close(values, second.history[column], rtol=1e-4, atol=1e-4)
    other = wrapped(backbone=Baked(chosen.flip(0)), settings=settings)
    if name != "Transfer":  # the undefended classifier knows of no class labels
        changed = suite(THREATS["linf"], seed=5)[name](other, images, labels)
        assert (changed.candidates - first.candidates).abs().max() > 1e-3


class Frozen(Denoiser):
    """Its weights are plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        for part in ("enter", "leave", "bias"):
            value = getattr(self, part).detach()
            delattr(self, part)
            setattr(self, part, value)


@EVERY
def test_a_classifier_may_be_a_plain_function_and_a_backbone_have_no_weights(name: str):
    images, labels = labelled(2)
    expected = suite(THREATS["linf"])[name](wrapped(), images, labels)
    result = suite(THREATS["linf"])[name](wrapped(classifier=linear, backbone=Frozen()), images, labels)
    torch.testing.assert_close(result.candidates, expected.candidates, rtol=0, atol=1e-6)
    assert not list(Frozen().parameters())
