"""Transfer: the inner attack on the source, re-evaluated on the model; and the sources."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import QUICK, SHAPE, THREATS, Denoiser, labelled, linear, search_seeds, suite, wrapped
from cmap_defense.attacks import (
    PGD,
    FrozenResidual,
    LatentAttack,
    NoiseAndDenoise,
    ShortCMAP,
    Shortened,
    Source,
    ThreatModel,
    Transfer,
    Undefended,
)
from cmap_defense.attacks.base import DENOISE, GRADIENT, LATENTS, NOT_LIVE, WRAPPER
from cmap_defense.common.rng import draw_latents
from cmap_defense.errors import GradientError, SettingsError
from cmap_defense.gradients import Detached, Implicit, StraightThrough, Surrogate, Unrolled
from cmap_defense.purifiers import OneStep
from toys import ToyBackbone

PLAIN = PGD(THREATS["linf"], steps=3, seed=4)


def two_classes(images: Tensor) -> Tensor:
    """Another model with the same number of classes."""
    return linear(images.flip(1))


def test_the_search_is_the_inner_attacks_and_the_reevaluation_the_models():
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


def test_shortened_is_the_same_defence_with_fewer_iterations():
    images, labels = labelled()
    model = wrapped(vote="soft")
    short = model.variant(settings=QUICK.replace(iterations=1))
    expected = PLAIN(short, images, labels)
    result = Transfer(PLAIN, source=Shortened(1))(model, images, labels)
    assert torch.equal(result.images, expected.images)
    source = Shortened(1).of(model)
    assert source.settings == QUICK.replace(iterations=1)
    with torch.no_grad():
        assert torch.equal(source(images, seeds=[1, 2, 3]), short(images, seeds=[1, 2, 3]))
        assert not torch.equal(short(images, seeds=[1, 2, 3]), model(images, seeds=[1, 2, 3]))


@pytest.mark.parametrize(("sigma", "steps"), [(0.1395, 1), (0.5, 1), (0.4, 2)])
@pytest.mark.parametrize("size", [None, (13, 11)])
def test_noise_and_denoise_written_out(sigma: float, steps: int, size: Any):
    """One step of the consistency function, or two down the schedule; resized there and back."""
    images, _ = labelled(2) if size is None else labelled(2, size)
    model = wrapped(resize=None if size is None else "bilinear", normalize=(0.5, 0.25))
    seeds, low, rho = torch.tensor([7, -8]), 0.002, 7.0
    drawn = draw_latents(seeds, steps, SHAPE)
    current = 2 * model.preprocessing.resized(images, SHAPE[1:]) - 1 + sigma * drawn[:, 0]
    current = Denoiser().denoise(current, sigma).clamp(-1, 1)
    if steps == 2:
        half = ((sigma ** (1 / rho) + low ** (1 / rho)) / 2) ** rho
        current = Denoiser().denoise(current + (half**2 - low**2) ** 0.5 * drawn[:, 1], half).clamp(-1, 1)
    expected = model.undefended(model.preprocessing.resized((current + 1) / 2, images.shape[2:]))
    source: Any = NoiseAndDenoise(sigma, steps=steps).of(model)
    torch.testing.assert_close(source(images, seeds=seeds), expected, rtol=1e-5, atol=1e-5)
    result = Transfer(PLAIN, source=NoiseAndDenoise(sigma, steps=steps))(model, images, torch.tensor([0, 1]))
    assert result.images.shape == images.shape


def test_noise_and_denoise_straight_through_has_the_values_of_the_other_and_the_derivative_of_the_classifier():
    images, _ = labelled()
    seeds, leaf = torch.tensor([7, -8, 9]), images.clone().requires_grad_()
    outputs, gradients = [], []
    for straight in (False, True):
        source: Any = NoiseAndDenoise(0.3, straight_through=straight).of(wrapped())
        outputs.append(source(leaf, seeds=seeds))
        gradients.append(torch.autograd.grad(outputs[-1][:, 1].sum(), leaf)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    weight = torch.autograd.grad(linear(leaf)[:, 1].sum(), leaf)[0]
    torch.testing.assert_close(gradients[1], weight)
    assert (gradients[0] - weight).abs().max() > 0.1


def test_noise_and_denoise_gets_the_noise_of_the_search():
    images, labels = labelled()
    model = wrapped()
    result = Transfer(PGD(THREATS["linf"], steps=1, random_start=False, seed=4), source=NoiseAndDenoise())(
        model, images, labels
    )
    leaf = images.clone().requires_grad_()
    logits = NoiseAndDenoise().of(model)(leaf, seeds=search_seeds(range(3), 4, 1))
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = (images + 0.025 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.history["loss"].sum(), loss.detach())


def test_noise_and_denoise_has_fresh_noise_where_the_defence_has_one_seed():
    """A gradient averaged over evaluations of one noise would be that of one evaluation."""
    images, _ = labelled()
    source: Any = NoiseAndDenoise(0.3).of(wrapped(seed=3))
    assert not torch.equal(source(images), source(images))
    seen = PGD(THREATS["linf"], steps=1, eot=4, random_start=False, seed=4)
    model = wrapped(seed=3)
    result = Transfer(seen, source=NoiseAndDenoise(0.3))(model, *labelled())
    one = Transfer(dataclasses.replace(seen, eot=1), source=NoiseAndDenoise(0.3))(model, *labelled())
    assert (result.history["loss"] - one.history["loss"]).abs().max() > 1e-4


def test_what_attacks_need_is_known_before_they_are_run():
    threat = THREATS["linf"]
    plain, cmap, blind = linear, wrapped(), wrapped(backbone=ToyBackbone())
    one_step = wrapped(settings=None, purifier=OneStep(level=0.3))
    noised = Transfer(PLAIN, source=NoiseAndDenoise())
    found = {
        name: [attack.missing(model) for model in (plain, blind, one_step, cmap)]
        for name, attack in {
            "pgd": PLAIN,
            "bpda": PGD(threat, gradient=StraightThrough()),
            "surrogate": PGD(threat, gradient=Surrogate()),
            "transfer": Transfer(PLAIN),
            "transfer of a gradient mode": Transfer(PGD(threat, gradient=Surrogate())),
            "transfer of a gradient mode from a function": Transfer(PGD(threat, gradient=Surrogate()), source=linear),
            "transfer from the short defence": Transfer(PGD(threat, gradient=Surrogate()), source=Shortened(2)),
            "noised": noised,
            "frozen": FrozenResidual(threat),
            "latent": LatentAttack(threat),
        }.items()
    }
    assert found == {
        "pgd": [None] * 4,
        "bpda": [WRAPPER, None, None, None],
        "surrogate": [WRAPPER, DENOISE, None, None],
        "transfer": [WRAPPER, None, None, None],
        "transfer of a gradient mode": [WRAPPER] * 4,
        "transfer of a gradient mode from a function": [WRAPPER] * 4,
        "transfer from the short defence": [WRAPPER, DENOISE, LATENTS, None],
        "noised": [WRAPPER, DENOISE, None, None],
        "frozen": [WRAPPER, None, None, None],
        "latent": [LATENTS, None, LATENTS, None],
    }


def test_the_mode_of_the_model_and_its_live_hooks_count_where_an_attack_names_no_mode_or_another():
    threat = THREATS["linf"]
    bpda, exact = PGD(threat, gradient=StraightThrough()), PGD(threat, gradient=Unrolled())
    one_step = wrapped(settings=None, purifier=OneStep(level=0.3))
    assert PLAIN.missing(wrapped(gradient=Detached())) == GRADIENT
    assert PLAIN.missing(one_step.variant(gradient=Implicit())) == LATENTS
    assert PLAIN.missing(wrapped(backbone=ToyBackbone(), gradient=Surrogate())) == DENOISE
    assert ShortCMAP(threat, gradient=Surrogate()).missing(wrapped(backbone=ToyBackbone())) == DENOISE
    assert bpda.missing(wrapped(gradient=Detached())) is None
    one_step.register_step_hook(lambda state: None)
    assert bpda.missing(one_step) is None
    one_step.register_step_hook(lambda state: None, live=True)
    assert [attack.missing(one_step) for attack in (bpda, PLAIN, exact)] == [NOT_LIVE, None, None]


def test_noise_and_denoise_needs_a_denoiser():
    with pytest.raises(GradientError, match=r"NoiseAndDenoise\(sigma=0.1395, .* needs a backbone with denoise"):
        Transfer(PLAIN, source=NoiseAndDenoise())(wrapped(backbone=ToyBackbone()), *labelled())


def test_a_source_that_is_no_wrapper_cannot_be_searched_by_its_latents():
    for attack in (LatentAttack(THREATS["linf"]), suite(THREATS["linf"])["PGD unrolled"]):
        with pytest.raises(SettingsError, match="PurifiedClassifier"):
            Transfer(attack)(wrapped(), *labelled())


@pytest.mark.parametrize("source", [Undefended(), Shortened(), NoiseAndDenoise()])
def test_sources_are_made_from_a_wrapper(source: Source):
    with pytest.raises(SettingsError, match="PurifiedClassifier"):
        Transfer(PLAIN, source=source)(linear, *labelled())
