"""Network passes are counted in the package's own calls, and leave no trace in the backbone."""

import threading

import pytest
import torch
from torch import Tensor

from attack_toys import QUICK, THREATS, Denoiser, wrapped
from cmap_defense.attacks import (
    PGD,
    SPSA,
    Attack,
    ConsistencyDisruption,
    FrozenResidual,
    LatentAttack,
    Overpowered,
    ShortCMAP,
    Transfer,
)
from cmap_defense.classifier.speed import measure_speed
from cmap_defense.common.passes import count_passes, counting_passes, not_counting
from cmap_defense.gradients import StraightThrough, Surrogate
from cmap_defense.purifiers import OneStep
from toys import ToyBackbone, uniform

LINF = THREATS["linf"]
IMAGES = uniform(3, 3, 8, 6, seed=0)
ONCE = QUICK.n_latents * (QUICK.iterations + 1)


class Nested(Denoiser):
    """It generates by denoising, as consistency models do."""

    def generate(self, latents: Tensor) -> Tensor:
        return self.denoise(latents, 0.0)


@pytest.mark.parametrize("backbone", [Nested(), ToyBackbone()])
def test_the_latents_of_a_purification_are_counted_once(backbone: ToyBackbone) -> None:
    model, before = wrapped(backbone=backbone, max_parallel=1000), dict(vars(backbone))
    with counting_passes() as outer:
        with counting_passes() as passes:
            model.purify(IMAGES, seeds=[0, 1, 2])
            model.undefended(IMAGES)
        model.purify(IMAGES[:1], seeds=[0])
    assert passes.total == 3 * ONCE
    assert outer.total == 4 * ONCE
    assert vars(backbone) == before
    model.purify(IMAGES, seeds=[0, 1, 2])
    assert outer.total == 4 * ONCE


def test_noisy_images_that_are_denoised_are_counted() -> None:
    model = wrapped(purifier=OneStep(n_latents=2), settings=None, max_parallel=1000)
    with counting_passes() as passes:
        model.purify(IMAGES, seeds=[0, 1, 2])
    assert passes.total == 3 * 2 == 3 * model.purifier.passes
    denoise = wrapped().denoiser()
    assert denoise is not None
    with counting_passes() as passes:
        denoise(IMAGES[:, None].expand(-1, 2, -1, -1, -1), 0.1)
    assert passes.total == 6


def test_a_counter_may_end_where_nothing_is_counted_and_other_threads_count_on() -> None:
    counter = counting_passes()
    with counting_passes() as whole:
        counter.__enter__()
        with not_counting():
            counter.__exit__(None, None, None)
            count_passes(5)
            with not_counting():
                pass
            count_passes(5)
            other = threading.Thread(target=count_passes, args=(2,))
            other.start()
            other.join()
        count_passes(1)
    count_passes(7)
    assert whole.total == 2 + 1


ATTACKS: dict[str, Attack] = {
    "transfer": Transfer(PGD(LINF, steps=3)),
    "bpda": PGD(LINF, steps=2, eot=3, gradient=StraightThrough()),
    "restarts": PGD(LINF, steps=2, restarts=2, keep="best"),
    "spsa": SPSA(LINF, steps=2, pairs=2),
    "latent": LatentAttack(LINF, steps=10, latents=3),
    "latent, from noise": LatentAttack(LINF, steps=3, latents=2, restarts=2, start="noise"),
    "overpowered": Overpowered(LINF, steps=3, latents=2),
    "disruption": ConsistencyDisruption(LINF, steps=30),
    "frozen residual": FrozenResidual(LINF, steps=5, every=2, purifications=2),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_declares_the_passes_of_its_search(name: str) -> None:
    """All but those of the choice between its attempts, and of one evaluation of the result."""
    attack, model = ATTACKS[name], wrapped(max_parallel=1000).eval()
    with torch.no_grad():
        labels = model.undefended(IMAGES).argmax(dim=1)
    with counting_passes() as passes:
        result = attack(model, IMAGES, labels)
    attempts = result.candidates.shape[1]
    after = (1 + (attempts if attempts > 1 else 0)) * ONCE
    assert attack.passes_per_image(model) == passes.total / 3 - after


def test_an_attack_that_does_not_know_its_passes_says_so() -> None:
    assert ShortCMAP(LINF).passes_per_image(wrapped()) is None
    assert Transfer(PGD(LINF, gradient=Surrogate()), source=lambda images: images).passes_per_image(wrapped()) == 0


def test_speed_is_time_and_memory() -> None:
    model, state = wrapped(max_parallel=1000).eval(), torch.get_rng_state()
    with counting_passes() as passes:
        found = measure_speed(model, IMAGES)
    assert found.seconds > 0
    assert found.bytes is None or found.bytes > 2**20
    assert passes.total == 2 * 3 * QUICK.n_latents * (3 + 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.settings == QUICK
