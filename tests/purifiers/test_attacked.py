"""Purifiers under attacks and in an evaluation, as CMAP is: on toys, and on the denoisers of the package."""

import dataclasses
import importlib.util
import itertools
import re

import pytest
import torch
from torch import nn

from attack_toys import Linear, labelled
from cmap_defense import PurifiedClassifier, ThreatModel, evaluate
from cmap_defense.attacks import APGD, PGD, SUITES, Attack, NoiseAndDenoise, Transfer, full_suite
from cmap_defense.attacks.suites import REPEATED, choose
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation import Protocol
from cmap_defense.gradients import StraightThrough, Unrolled
from cmap_defense.purifiers import ADP, CMAP, GDMP, GNSP, Chain, DiffPure, LikelihoodMaximisation, OneStep, Purifier
from cmap_defense.purifiers.pair import BackbonePair
from denoisers import SHAPE, CurvedDenoiser
from toys import ToyBackbone

THREAT = ThreatModel(eps=0.1)
PROTOCOL = Protocol(predictions=2, reevaluations=1, group=2, sanity_images=1, gradient_samples=2)


def defended(purifier: Purifier) -> PurifiedClassifier:
    return PurifiedClassifier(Linear(), CurvedDenoiser(), purifier=purifier).eval()


ATTACKS = {
    "exact": PGD(THREAT, steps=2, eot=2, gradient=Unrolled()),
    "straight": PGD(THREAT, steps=2, gradient=StraightThrough()),
    "apgd": APGD(THREAT, steps=5, gradient=Unrolled()),
    "transfer": Transfer(PGD(THREAT, steps=2)),
    "surrogate": Transfer(PGD(THREAT, steps=2), source=NoiseAndDenoise()),
}


@pytest.mark.parametrize("purifier", [DiffPure(t=3, n_latents=2), ADP(iterations=2, n_latents=2)], ids=["sde", "adp"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_run(purifier: Purifier, name: str) -> None:
    images, labels = labelled(2)
    result = ATTACKS[name](defended(purifier), images, labels)
    assert ((result.images - images).abs() <= THREAT.eps + 1e-6).all()
    assert result.queries > 0


SIZES = {"steps": 1, "eot": 1, "queries": 1, "pairs": 1, "every": 1, "purifications": 1, "rounds": 1, "samples": 1}


def small(attack: Attack) -> Attack:
    """The same attack with as little to do as there can be."""
    if isinstance(attack, Transfer):
        return dataclasses.replace(attack, attack=small(attack.attack))
    fields = {field.name for field in dataclasses.fields(attack)}
    return dataclasses.replace(attack, **{name: size for name, size in SIZES.items() if name in fields})


@pytest.mark.parametrize("name", sorted({name for made in SUITES.values() for name in made(THREAT)}))
def test_what_suits_a_purifier_without_latents_runs_on_it(name: str) -> None:
    """An evaluation finds out after hours otherwise."""
    model = defended(OneStep(level=0.3, n_latents=2))
    found = [made(THREAT)[name] for made in SUITES.values() if name in made(THREAT)]
    for attack in {small(attack) for attack in found if attack.missing(model) is None}:
        assert attack(model, *labelled(2)).queries > 0
    latents = {"latent", "consistency-disruption", "short-cmap", "target-steer", "overpowered", "transfer-short"}
    assert all((attack.missing(model) is None) == (name not in {*latents, "implicit"}) for attack in found)


@pytest.mark.parametrize(
    ("purifier", "repeated"),
    [
        (OneStep(level=0.3), ["unrolled-last", "unrolled"]),
        (Chain(OneStep(level=0.3), DiffPure(t=2)), ["unrolled-last", "unrolled"]),
        (Chain(OneStep(level=0.3), CMAP()), []),
        (CMAP(), []),
    ],
)
def test_a_set_has_no_attack_twice(purifier: Purifier, repeated: list[str]) -> None:
    """Where there are no latents, the settings of the gradient through their optimisation have no effect."""
    attacks, pair = full_suite(THREAT), BackbonePair(ToyBackbone(SHAPE), CurvedDenoiser())
    one, cmap = (PurifiedClassifier(Linear(), pair, purifier=part) for part in (purifier, CMAP()))
    chosen, left_out = choose(attacks, [one])
    assert left_out.get(REPEATED, []) == repeated
    assert sorted([*chosen, *itertools.chain(*left_out.values())]) == sorted(attacks)
    assert {"unrolled-last", "unrolled"} <= choose(attacks, [one, cmap])[0].keys(), "on one of the two they differ"


def test_what_is_left_out_as_a_repetition_finds_the_same_images() -> None:
    images, labels = labelled(3)
    model, attacks = defended(DiffPure(t=3, n_latents=2)), full_suite(THREAT, steps=2, eot=1)
    found = [attacks[name](model, images, labels).images for name in ("exact-eot", "unrolled-last", "unrolled")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_exact_gradient_finds_more_than_chance() -> None:
    """Along the gradient the loss rises; along its opposite it falls."""
    images, labels = labelled(3)
    model = defended(DiffPure(t=40, n_latents=4)).variant(gradient=Unrolled(), seed=3, vote="soft")

    def loss(at: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(at), labels)

    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    with torch.no_grad():
        down, here, up = (loss((images + s * gradient.sign()).clamp(0, 1)).item() for s in (-0.02, 0.0, 0.02))
    assert down < here < up


def test_an_evaluation_of_diffpure() -> None:
    report = evaluate(
        defended(DiffPure(t=3, n_latents=2)),
        labelled(2),
        attacks={"exact": ATTACKS["exact"], "transfer": ATTACKS["transfer"]},
        protocol=PROTOCOL,
        threads=1,
    )
    assert report.to_dict()["settings"]["models"]["defended"]["purifier"]["t"] == 3


def test_attacks_on_latents_say_that_there_are_none() -> None:
    from cmap_defense.attacks import ShortCMAP

    images, labels = labelled(2)
    with pytest.raises(SettingsError, match=r"^ShortCMAP is an attack on latents, which DiffPure does not optimise"):
        ShortCMAP(THREAT, steps=1)(defended(DiffPure(t=2)), images, labels)


QUICK = {
    "diffpure": DiffPure(t=3, n_latents=2),
    "gdmp": GDMP(t=2, rounds=1, n_latents=2),
    "adp": ADP(iterations=1, n_latents=2),
    "gnsp": GNSP(rounds=(2,), n_latents=2),
    "likelihood": LikelihoodMaximisation(iterations=1),
}


@pytest.mark.parametrize("purifier", QUICK.values(), ids=QUICK)
def test_the_package_s_denoiser_of_fashion_mnist(purifier: Purifier) -> None:
    images, labels = (part[:2] for part in load_test_images())
    model = PurifiedClassifier(load_classifier(), "fashion-mnist-edm", purifier=purifier).eval()
    result = model.purify(images)
    assert result.images.shape == (2, purifier.n_latents, 1, 28, 28)
    attacked = PGD(THREAT, steps=1, gradient=Unrolled(), random_start=False)(model, images, labels)
    assert not torch.equal(attacked.images, images)
    assert (attacked.history["gradient_norm"] > 0).all()


class Pooled(nn.Module):
    """Four classes from the mean colours of the quarters."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).mean(dim=1).flatten(1)


def test_the_package_s_denoiser_of_cifar10_is_attacked_and_evaluated() -> None:
    images = 0.3 + 0.4 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = Pooled()(images).argmax(dim=1)
    model = PurifiedClassifier(Pooled(), "cifar10-edm-small", purifier=DiffPure(t=2)).eval()
    result = PGD(THREAT, steps=1, gradient=Unrolled())(model, images, labels)
    assert result.images.shape == images.shape
    protocol = PROTOCOL.replace(sanity_images=0)  # the checks take most of the time
    attacks = {"pgd": Transfer(PGD(THREAT, steps=1))}
    report = evaluate(model, (images, labels), attacks=attacks, protocol=protocol, threads=1)
    assert report.row("pgd") is not None


def test_a_chain_with_the_package_s_pair() -> None:
    chain = Chain(DiffPure(t=2), CMAP(CMAPSettings(n_latents=2, iterations=2)))
    model = PurifiedClassifier(Pooled(), ("cifar10-ct-small", "cifar10-edm-small"), purifier=chain, seed=1).eval()
    assert model.variant(gradient=Unrolled()).purify(torch.rand(1, 3, 32, 32).requires_grad_()).images.requires_grad
    assert "Chain(DiffPure(" in repr(model)
    pair = r"  consistency: cifar10-ct-small, [\d,]+ parameters\n  denoiser: cifar10-edm-small, [\d,]+ parameters\n"
    assert re.search(pair, repr(model))


if importlib.util.find_spec("pyautoattack") is None:
    del ATTACKS["apgd"]
