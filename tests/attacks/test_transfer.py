"""Transfer: the inner attack on the source, judged on the model; and the sources."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import (
    QUICK,
    SHAPE,
    THREATS,
    Denoiser,
    Noisy,
    labelled,
    linear,
    reevaluation_seeds,
    search_seeds,
    suite,
    wrapped,
)
from cmap_defense.attacks import (
    PGD,
    SPSA,
    LatentAttack,
    NoiseAndDenoise,
    Shortened,
    Source,
    ThreatModel,
    Transfer,
    Undefended,
)
from cmap_defense.errors import GradientError, SettingsError
from cmap_defense.rng import draw_latents
from toys import ToyBackbone

PLAIN = PGD(THREATS["linf"], steps=3, seed=4)


def two_classes(images: Tensor) -> Tensor:
    """Another model with the same number of classes."""
    return linear(images.flip(1))


def test_the_search_is_the_inner_attacks_and_the_judgement_the_models():
    images, labels = labelled(20)
    inner = PGD(ThreatModel(eps=0.02), steps=3, restarts=2, keep="best", seed=4)
    alone = inner(two_classes, images, labels)
    result = Transfer(inner, source=two_classes)(linear, images, labels)
    assert torch.equal(result.candidates, alone.candidates)
    for column, values in alone.history.items():
        assert torch.equal(result.history[column], values)
    assert torch.equal(result.success, linear(result.images).argmax(dim=1) != labels)
    expected = torch.stack([linear(part).argmax(dim=1) for part in result.candidates.unbind(dim=1)], dim=1)
    assert torch.equal(result.candidate_predictions, expected)
    assert not torch.equal(result.candidate_predictions, alone.candidate_predictions)
    assert result.queries == alone.queries == 2 * 3 + 4 + 1


@pytest.mark.parametrize("aimed", [False, True])
def test_undefended_is_the_bare_classifier(aimed: bool):
    images, labels = labelled()
    targets = (labels + 1) % 4 if aimed else None
    expected = PLAIN(linear, images, labels, targets=targets)
    result = Transfer(PLAIN)(wrapped(), images, labels, targets=targets)
    torch.testing.assert_close(result.images, expected.images, rtol=0, atol=1e-6)
    seeds = reevaluation_seeds(range(3), 4, 1)
    with torch.no_grad():
        assert torch.equal(result.predictions[0], wrapped()(result.images, seeds=seeds).argmax(dim=1))
    torch.testing.assert_close(Undefended().of(wrapped())(images), linear(images))


def test_shortened_is_the_same_defence_with_fewer_iterations():
    images, labels = labelled()
    model = wrapped(vote="soft")
    short = model.variant(settings=QUICK.replace(iterations=1))
    expected = PLAIN(short, images, labels)
    result = Transfer(PLAIN, source=Shortened(1))(model, images, labels)
    assert torch.equal(result.images, expected.images)
    source = Shortened(1).of(model)
    assert source.settings == QUICK.replace(iterations=1)  # pyright: ignore[reportFunctionMemberAccess]
    with torch.no_grad():
        assert torch.equal(source(images, seeds=[1, 2, 3]), short(images, seeds=[1, 2, 3]))  # pyright: ignore
        assert not torch.equal(short(images, seeds=[1, 2, 3]), model(images, seeds=[1, 2, 3]))


@pytest.mark.parametrize("sigma", [0.1395, 0.5])
def test_noise_and_denoise_is_one_step_of_the_consistency_function(sigma: float):
    images, _ = labelled()
    seeds = torch.tensor([7, -8, 9])
    source = NoiseAndDenoise(sigma).of(wrapped())
    noisy = 2 * images - 1 + sigma * draw_latents(seeds, 1, SHAPE)[:, 0]
    denoised = (Denoiser().denoise(noisy, sigma).clamp(-1, 1) + 1) / 2
    answer = source(images, seeds=seeds)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(answer, linear(denoised), rtol=1e-5, atol=1e-5)


def test_noise_and_denoise_in_two_steps_goes_down_a_schedule():
    images, _ = labelled()
    seeds, sigma, low, rho = torch.tensor([7, -8, 9]), 0.4, 0.002, 7.0
    drawn = draw_latents(seeds, 2, SHAPE)
    half = ((sigma ** (1 / rho) + low ** (1 / rho)) / 2) ** rho
    current = Denoiser().denoise(2 * images - 1 + sigma * drawn[:, 0], sigma).clamp(-1, 1)
    current = Denoiser().denoise(current + (half**2 - low**2) ** 0.5 * drawn[:, 1], half).clamp(-1, 1)
    answer = NoiseAndDenoise(sigma, steps=2).of(wrapped())(images, seeds=seeds)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(answer, linear((current + 1) / 2), rtol=1e-5, atol=1e-5)


def test_noise_and_denoise_straight_through_has_the_values_of_the_other_and_the_derivative_of_the_classifier():
    images, _ = labelled()
    seeds, leaf = torch.tensor([7, -8, 9]), images.clone().requires_grad_()
    answers, gradients = [], []
    for straight in (False, True):
        source: Any = NoiseAndDenoise(0.3, straight_through=straight).of(wrapped())
        answers.append(source(leaf, seeds=seeds))
        gradients.append(torch.autograd.grad(answers[-1][:, 1].sum(), leaf)[0])
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-5)
    weight = torch.autograd.grad(linear(leaf)[:, 1].sum(), leaf)[0]
    torch.testing.assert_close(gradients[1], weight)
    assert (gradients[0] - weight).abs().max() > 0.1


def test_noise_and_denoise_belongs_to_the_seeds():
    images, _ = labelled()
    source: Any = NoiseAndDenoise().of(wrapped())
    seeds = torch.tensor([1, 2, 3])
    whole = source(images, seeds=seeds)
    assert torch.equal(source(images, seeds=seeds), whole)
    torch.testing.assert_close(source(images[1:2], seeds=seeds[1:2]), whole[1:2], rtol=1e-5, atol=1e-5)
    assert (source(images, seeds=seeds + 3) - whole).abs().flatten(1).amax(dim=1).min() > 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = source(images), source(images)
        torch.manual_seed(0)
        assert torch.equal(source(images), first)
    assert not torch.equal(first, second)
    seeded: Any = NoiseAndDenoise().of(wrapped(seed=2))
    assert torch.equal(seeded(images), source(images, seeds=torch.tensor([2, 2, 2])))


def test_noise_and_denoise_gets_the_noise_of_the_search():
    images, labels = labelled()
    model = wrapped()
    result = Transfer(PGD(THREATS["linf"], steps=1, random_start=False, seed=4), source=NoiseAndDenoise())(
        model, images, labels
    )
    leaf = images.clone().requires_grad_()
    logits = NoiseAndDenoise().of(model)(leaf, seeds=search_seeds(range(3), 4, 1))  # pyright: ignore
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = (images + 0.025 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.history["loss"].sum(), loss.detach())


def test_noise_and_denoise_resizes_there_and_back():
    images, labels = labelled(2, (13, 11))
    model = wrapped(resize="bilinear", normalize=(0.5, 0.25))
    seeds = torch.tensor([1, 2])
    small = model.preprocessing.resized(images, SHAPE[1:])
    noisy = 2 * small - 1 + 0.1395 * draw_latents(seeds, 1, SHAPE)[:, 0]
    denoised = (Denoiser().denoise(noisy, 0.1395).clamp(-1, 1) + 1) / 2
    expected = model.undefended(model.preprocessing.resized(denoised, (13, 11)))
    answer = NoiseAndDenoise().of(model)(images, seeds=seeds)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(answer, expected)
    assert Transfer(PLAIN, source=NoiseAndDenoise())(model, images, labels).images.shape == images.shape


def test_noise_and_denoise_needs_a_denoiser():
    with pytest.raises(GradientError, match=r"NoiseAndDenoise\(sigma=0.1395, .* needs a backbone with denoise"):
        Transfer(PLAIN, source=NoiseAndDenoise())(wrapped(backbone=ToyBackbone()), *labelled())


def test_a_model_of_yours_is_seeded_where_it_can_be():
    images, labels = labelled()
    source = Noisy()
    Transfer(PLAIN, source=source)(linear, images, labels)
    expected = [search_seeds(range(3), 4, step) for step in (1, 2, 3)]
    assert [seeds.tolist() for seeds in source.seen if seeds is not None] == [seeds.tolist() for seeds in expected]


def test_an_attack_on_latents_may_search_a_shorter_defence():
    images, labels = labelled()
    inner = LatentAttack(THREATS["linf"], steps=3, latents=2, seed=4)
    expected = inner(wrapped(settings=QUICK.replace(iterations=1)), images, labels)
    result = Transfer(inner, source=Shortened(1))(wrapped(), images, labels)
    assert torch.equal(result.candidates, expected.candidates)


def test_a_source_that_is_no_wrapper_cannot_be_searched_by_its_latents():
    for attack in (LatentAttack(THREATS["linf"]), suite(THREATS["linf"])["PGD unrolled"]):
        with pytest.raises(SettingsError, match="PurifiedClassifier"):
            Transfer(attack)(wrapped(), *labelled())


@pytest.mark.parametrize("source", [Undefended(), Shortened(), NoiseAndDenoise()])
def test_sources_are_made_from_a_wrapper(source: Source):
    with pytest.raises(SettingsError, match="PurifiedClassifier"):
        Transfer(PLAIN, source=source)(linear, *labelled())


def test_transfers_within_transfers():
    images, labels = labelled()
    twice = Transfer(Transfer(PLAIN, source=linear), source=two_classes)
    assert torch.equal(twice(wrapped(), images, labels).images, PLAIN(linear, images, labels).images)


# ----------------------------------------------------------------------------------------------------------- as a value


def test_threat_restarts_seed_and_noise_are_the_inner_attacks():
    inner = SPSA(THREATS["l2"], restarts=3, seed=9, noise="known")
    attack = Transfer(inner)
    assert (attack.threat, attack.restarts, attack.seed, attack.noise) == (THREATS["l2"], 3, 9, "known")
    for name in ("threat", "restarts", "seed", "noise"):
        with pytest.raises(TypeError):
            Transfer(inner, **{name: getattr(inner, name)})
    replaced = dataclasses.replace(attack, attack=PLAIN)
    assert (replaced.threat, replaced.seed) == (THREATS["linf"], 4)


def test_equality_and_repr():
    assert Transfer(PLAIN) == Transfer(PLAIN, source=Undefended())
    assert Transfer(PLAIN) == Transfer(PGD(THREATS["linf"], steps=3, seed=4))
    assert Transfer(PLAIN) != Transfer(PLAIN, source=Shortened())
    assert Transfer(PLAIN) != Transfer(PGD(THREATS["linf"], steps=3, seed=5))
    assert Transfer(PLAIN, source=linear) == Transfer(PLAIN, source=linear)
    assert Shortened(3) == Shortened(3) != Shortened(4)
    assert NoiseAndDenoise(0.2) != NoiseAndDenoise(0.2, steps=2)
    assert len({Transfer(PLAIN), Transfer(PLAIN), Transfer(PLAIN, source=Shortened(3))}) == 2
    for part in ("Transfer(", "attack=PGD(", "source=Shortened(iterations=3)", "seed=4"):
        assert part in repr(Transfer(PLAIN, source=Shortened(3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Transfer("PGD"),  # pyright: ignore[reportArgumentType]
        lambda: Transfer(PGD),  # pyright: ignore[reportArgumentType]
        lambda: Transfer(PLAIN, source="undefended"),  # pyright: ignore[reportArgumentType]
        lambda: Transfer(PLAIN, source=None),  # pyright: ignore[reportArgumentType]
        lambda: Shortened(0),
        lambda: Shortened(1.5),  # pyright: ignore[reportArgumentType]
        lambda: NoiseAndDenoise(0.0),
        lambda: NoiseAndDenoise(-1.0),
        lambda: NoiseAndDenoise(steps=0),
    ],
)
def test_nonsense_is_refused(make: Any):
    with pytest.raises(SettingsError):
        make()


def test_a_class_in_place_of_a_source_is_refused():
    with pytest.raises(SettingsError):
        Transfer(PLAIN, source=Undefended)(wrapped(), *labelled())
