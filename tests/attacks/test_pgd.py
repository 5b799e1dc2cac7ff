"""PGD and the attack base: inside the ball, judged afresh, stronger with more steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.attacks import PGD, Attack, Candidates, Goal, ThreatModel
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.errors import CmapError, GradientError
from toys import noise, uniform

SHAPE = (3, 7, 5)
WEIGHT = noise(105, 4, seed=2)


def linear(images: Tensor) -> Tensor:
    return (images.flatten(1) - 0.5) @ WEIGHT.to(images)


def labelled(count: int = 6) -> tuple[Tensor, Tensor]:
    images = uniform(count, *SHAPE, seed=1)
    return images, linear(images).argmax(dim=1)


@settings(max_examples=25)
@given(norm=st.sampled_from(["linf", "l2"]), eps=st.floats(0, 0.5), steps=st.integers(1, 4), start=st.booleans())
def test_adversarial_images_stay_in_the_ball_and_the_range(norm: str, eps: float, steps: int, start: bool) -> None:
    images, labels = labelled()
    threat = ThreatModel(norm=norm, eps=eps)
    result = PGD(threat, steps=steps, random_start=start)(linear, images, labels)
    assert (threat.distance(result.images, images) <= eps + 1e-6).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert torch.equal(result.success, linear(result.images).argmax(1) != labels)
    assert torch.equal(result.distance, threat.distance(result.images, images))
    assert result.queries == steps + 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_on_a_linear_margin_is_the_best_there_is(norm: str) -> None:
    def two_classes(images: Tensor) -> Tensor:
        score = images.flatten(1) @ WEIGHT[:, 0]
        return torch.stack([score, -score], dim=1) / 100

    images = torch.full((2, *SHAPE), 0.5)
    labels = torch.zeros(2, dtype=torch.int64)
    threat = ThreatModel(norm=norm, eps=0.1)
    found = PGD(threat, steps=1, step_size=0.1, random_start=False)(two_classes, images, labels).images
    direction = -WEIGHT[:, 0].sign() if norm == "linf" else -WEIGHT[:, 0] / WEIGHT[:, 0].norm()
    assert torch.allclose((found - images).flatten(1), 0.1 * direction.expand(2, -1), atol=1e-6)


def test_success_rises_with_eps_and_is_complete_at_one() -> None:
    images, labels = labelled(20)
    rates = [
        PGD(ThreatModel(eps=eps), steps=10)(linear, images, labels).success.float().mean().item()
        for eps in (0.0, 0.02, 1.0)
    ]
    assert rates[0] == 0
    assert rates[0] < rates[1] <= rates[2] == 1


def test_the_random_start_is_the_seeds_and_leaves_the_global_generator_alone() -> None:
    images, labels = labelled()
    before = torch.get_rng_state()
    first, again, other = (PGD(ThreatModel(), steps=1, seed=s)(linear, images, labels).images for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_attack_that_leaves_its_ball_is_projected_before_it_is_judged() -> None:
    class Cheat(Attack):
        def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
            return Candidates(1 - clean[:, None])

    images, labels = labelled()
    result = Cheat(ThreatModel(eps=0.0))(linear, images, labels)
    assert torch.equal(result.images, images)
    assert not result.success.any()


def test_an_empty_batch_is_fine() -> None:
    images, labels = labelled()
    assert PGD(ThreatModel())(linear, images[:0], labels[:0]).images.shape == (0, *SHAPE)


def test_a_model_without_a_gradient_is_an_error() -> None:
    images, labels = labelled()
    with pytest.raises(GradientError):
        PGD(ThreatModel())(lambda x: linear(x).detach(), images, labels)


def test_bad_arguments() -> None:
    images, labels = labelled()
    for wrong in (lambda: PGD(ThreatModel(), steps=0), lambda: ThreatModel(norm="l1"), lambda: ThreatModel(eps=-1.0)):
        with pytest.raises(CmapError):
            wrong()
    with pytest.raises(CmapError, match="one per image"):
        PGD(ThreatModel())(linear, images, labels[:2])
    with pytest.raises(CmapError, match="255"):
        PGD(ThreatModel())(linear, images * 255, labels)
