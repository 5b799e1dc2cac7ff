"""What an evaluation will cost: against what it does cost, and without a trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import CLASSES, QUICK, THREATS, Denoiser, linear, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import (
    PGD,
    SPSA,
    Attack,
    Candidates,
    ConsistencyDisruption,
    FrozenResidual,
    Goal,
    LatentAttack,
    NoiseAndDenoise,
    ShortCMAP,
    Shortened,
    TargetSteer,
    Transfer,
)
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.evaluation.cost import counted_passes, probe, rehearse
from cmap_defense.gradients import Implicit, StraightThrough, Surrogate, Unrolled
from toys import ToyBackbone, uniform

LINF = THREATS["linf"]
LONG = QUICK.replace(iterations=12)
TOGETHER = 8


def model(**options: Any) -> PurifiedClassifier:
    """A loop that is longer than those of the stand-in; with ``max_parallel``, nothing is asked about memory."""
    return wrapped(**({"settings": LONG, "max_parallel": 1000} | options)).eval()


# --- counting ---------------------------------------------------------------------------------------------------------


class Nested(Denoiser):
    """It generates by denoising, as consistency models do."""

    def generate(self, latents: Tensor) -> Tensor:
        return self.denoise(latents, 0.0)


def test_the_latents_of_a_purification_are_counted() -> None:
    given = model()
    images = uniform(3, 3, 8, 6, seed=0)
    with counted_passes(given) as passes:
        given.purify(images, seeds=[0, 1, 2])
        assert passes == [3 * 2 * (12 + 1)]
        given.undefended(images)
        assert passes == [3 * 2 * (12 + 1)]
    given.purify(images, seeds=[0, 1, 2])
    assert passes == [3 * 2 * (12 + 1)]


def test_passes_inside_of_others_are_not_counted_twice() -> None:
    backbone = Nested()
    given = model(backbone=backbone)
    latents = uniform(5, 3, 8, 6, seed=0)
    with counted_passes(given) as passes:
        backbone.generate(latents)
        assert passes == [5]
        backbone.denoise(latents[:2], 0.1)
        assert passes == [7]
        backbone.generate(latents)
        assert passes == [12]


class Failing(Nested):
    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        if sigma == 13:
            raise ArithmeticError
        return super().denoise(noisy, sigma)


def test_after_a_failure_inside_counting_goes_on() -> None:
    backbone = Failing()
    latents = uniform(5, 3, 8, 6, seed=0)
    with counted_passes(model(backbone=backbone)) as passes:
        with pytest.raises(ArithmeticError):
            backbone.denoise(latents, 13)
        backbone.generate(latents[:1])
        assert passes == [6]


def own_generate(latents: Tensor) -> Tensor:
    return torch.tanh(latents)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_the_backbone_is_left_as_it_was(fails: bool, own: bool) -> None:
    """Also one with a method of its own."""
    backbone = Denoiser()
    if own:
        backbone.generate = own_generate
    given = model(backbone=backbone)
    before = dict(vars(backbone))

    def use() -> None:
        with counted_passes(given):
            given.purify(uniform(1, 3, 8, 6, seed=0), seeds=[0])
            assert vars(backbone)["generate"] is not before.get("generate")
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    assert vars(backbone) == before
    assert vars(backbone).get("generate") is (own_generate if own else None)


def test_counting_inside_of_counting() -> None:
    given = model(backbone=Nested())
    with counted_passes(given) as outer:
        with counted_passes(given) as inner:
            given.backbone.generate(uniform(2, 3, 8, 6, seed=0))
        given.backbone.generate(uniform(3, 3, 8, 6, seed=0))
    assert (outer, inner) == ([5], [2])
    assert "generate" not in vars(given.backbone)


@pytest.mark.parametrize("other", [linear, wrapped(backbone=ToyBackbone()).classifier, None])
def test_another_model_has_no_passes(other: Any) -> None:
    with counted_passes(other) as passes:
        pass
    assert passes == [0]


def test_a_backbone_that_only_generates_is_counted() -> None:
    given = model(backbone=ToyBackbone())
    with counted_passes(given) as passes:
        given.purify(uniform(1, 3, 8, 6, seed=0), seeds=[0])
    assert passes == [2 * 13]


# --- in advance -------------------------------------------------------------------------------------------------------

ATTACKS: dict[str, Attack] = {
    "transfer": Transfer(PGD(LINF, steps=3)),
    "transfer from a short one": Transfer(PGD(LINF, steps=2), source=Shortened(5)),
    "transfer from a denoiser": Transfer(PGD(LINF, steps=2), source=NoiseAndDenoise()),
    "bpda": PGD(LINF, steps=2, eot=3, gradient=StraightThrough()),
    "restarts": PGD(LINF, steps=2, restarts=2, keep="best"),
    "surrogate": PGD(LINF, steps=2, eot=2, gradient=Surrogate(steps=2)),
    "spsa": SPSA(LINF, steps=2, pairs=2),
    "implicit": PGD(LINF, steps=1, gradient=Implicit(damping=1.0, iterations=3, tolerance=0.0)),
    "latent": LatentAttack(LINF, steps=10, latents=3),
    "disruption": ConsistencyDisruption(LINF, steps=30),
    "unrolled": PGD(LINF, steps=1, gradient=Unrolled(checkpoint=False)),
    "unrolled, computed again": PGD(LINF, steps=1, gradient=Unrolled(l1_smoothing=0.3, max_growth=1.0)),
    "unrolled, the last three": PGD(LINF, steps=2, gradient=Unrolled(last=3)),
    "unrolled, the last six": PGD(LINF, steps=1, gradient=Unrolled(last=6)),
    "target-steer": TargetSteer(LINF, steps=2, gradient=Unrolled(last=3), target=LatentAttack(LINF, steps=4)),
    "short": ShortCMAP(LINF, steps=4, iterations=2, refresh=2),
    "frozen residual": FrozenResidual(LINF, steps=6, every=2, purifications=2),
}


def cost(attack: Attack, given: PurifiedClassifier) -> tuple[int, float]:
    """Queries and passes per image, of an attack that breaks nothing: with labels that the classifier never gives."""
    images = uniform(TOGETHER, 3, 8, 6, seed=0)
    with torch.no_grad():
        labels = given.undefended(images).argmax(dim=1)
    with counted_passes(given) as passes:
        result = attack(given, images, labels)
    return result.queries, passes[0] / TOGETHER


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_what_was_said_before(name: str) -> None:
    """Within what the memory of the stand-in's chunks is asked about, five latents per purification."""
    found = rehearse(ATTACKS[name], model(), CLASSES)
    assert found is not None
    queries, passes = cost(ATTACKS[name], model())
    assert found.queries == queries
    assert found.passes == pytest.approx(passes, rel=0.04)


@pytest.mark.parametrize("iterations", [2, 60])
def test_loops_of_other_lengths(iterations: int) -> None:
    given = model(settings=LONG.replace(iterations=iterations, n_latents=3))
    attack = PGD(LINF, steps=1, gradient=StraightThrough())
    found = rehearse(attack, given, CLASSES)
    assert found is not None
    assert found.passes == pytest.approx(2 * 3 * (iterations + 1), rel=0.15 if iterations == 2 else 0.01)


def test_the_gradient_mode_of_the_model_counts() -> None:
    attack = PGD(LINF, steps=2)
    given = model(gradient=Unrolled(last=3))
    found = rehearse(attack, given, CLASSES)
    assert found is not None
    assert found.passes == pytest.approx(cost(attack, given)[1], rel=0.04)


def test_a_model_of_one_noise_costs_the_same() -> None:
    attack = PGD(LINF, steps=2)
    assert rehearse(attack, model(seed=3), CLASSES) == rehearse(attack, model(), CLASSES)


def test_the_size_of_the_images_is_no_matter() -> None:
    """The stand-in's are small, and of as many channels."""
    given = PurifiedClassifier(linear, ToyBackbone((1, 40, 30)), settings=LONG)
    found = rehearse(PGD(LINF, steps=2), given, 10)
    assert found is not None
    assert found.passes == pytest.approx(3 * 2 * 13, rel=0.04)


class Conditional(Denoiser):
    num_classes = 3

    def generate(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return super().generate(latents) * (1 - 0.1 * class_labels[:, None, None, None])


def test_a_class_conditional_backbone() -> None:
    given = model(backbone=Conditional(), classifier=lambda images: linear(images)[:, :3])
    attack = PGD(LINF, steps=2)
    found = rehearse(attack, given, 3)
    assert found is not None
    assert found.passes == pytest.approx(cost(attack, given)[1], rel=0.04)


@dataclasses.dataclass(frozen=True)
class Raising(Attack):
    error: type[Exception] = ValueError

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        raise self.error


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_the_cost_of_an_attack_that_does_not_run_on_a_stand_in_is_unknown(error: type[Exception]) -> None:
    assert rehearse(Raising(LINF, error=error), model(), CLASSES) is None
    sized = Transfer(PGD(LINF), source=lambda images: images.view(len(images), 3, 8, 6).flatten(1)[:, :CLASSES])
    assert rehearse(sized, model(), CLASSES) is None


def test_a_rehearsal_does_not_touch_the_model_or_the_generators() -> None:
    given = model()
    before, state = dict(vars(given.backbone)), torch.get_rng_state()
    with counted_passes(given) as passes:
        rehearse(PGD(LINF, steps=2), given, CLASSES)
    assert passes == [0]
    assert vars(given.backbone) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probe_tells_time_and_memory() -> None:
    given, state = model(), torch.get_rng_state()
    images = uniform(4, 3, 8, 6, seed=0)
    with counted_passes(given) as passes:
        found = probe(given, images)
    assert 0 < found.seconds < 1
    assert found.bytes is None or found.bytes > 2**20
    assert passes == [2 * 4 * 2 * (3 + 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert given.settings == LONG
