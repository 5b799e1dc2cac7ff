"""SPSA: a gradient from queries alone, right on average, of models that have none."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import SHAPE, WEIGHT, Noisy, labelled, linear
from cmap_defense.attacks import SPSA, CrossEntropy, Goal, Margin, ThreatModel
from cmap_defense.attacks.oracle import Oracle
from toys import uniform

LABELS = torch.tensor([0, 1])
MIDDLE = 0.3 + 0.4 * uniform(2, *SHAPE, seed=3, dtype=torch.float64)
"""Far enough from 0 and 1 that no query is clamped."""


def two(images: Tensor) -> Tensor:
    """Two classes, so that the margin is linear everywhere."""
    return linear(images)[:, :2]


class Shaken(Noisy):
    """Two classes of an image that is shaken by a tenth."""

    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        return super().__call__(images, seeds=seeds)[:, :2]


toy = Shaken(0.3)


def estimate(pairs: int, seed: int = 0, model: Any = two, images: Tensor = MIDDLE, **options: Any) -> Any:
    """SPSA's feedback at some images, and the true one of the same loss."""
    attack = SPSA(ThreatModel(), pairs=pairs, **options)
    oracle, goal = Oracle(model, torch.tensor([seed, seed + 1])), Goal(LABELS)
    feedback, start = attack.begin(oracle, images, goal)
    assert start is None
    return feedback(images), Oracle(two, torch.arange(2)).feedback(images, goal, attack.loss, 1), oracle


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), delta=st.sampled_from([1e-3, 0.01, 0.05]))
def test_one_pair_is_the_slope_along_a_direction_of_ones(seed: int, delta: float):
    found, true, _ = estimate(1, seed=seed, delta=delta)
    direction = found.gradient.sign()
    slope = (true.gradient * direction).flatten(1).sum(dim=1)
    expected = slope.abs()[:, None, None, None].expand_as(direction)
    torch.testing.assert_close(found.gradient.abs(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.gradient, direction * expected)
    assert (slope > 0).all()
    torch.testing.assert_close(found.loss, true.loss)
    assert (direction > 0).flatten(1).sum(dim=1).min() > 40


def test_loss_and_reached_are_means_over_all_queries():
    found, true, oracle = estimate(50)
    assert oracle.count == 100
    torch.testing.assert_close(found.loss, true.loss, rtol=0, atol=1e-9)
    wrong = (two(MIDDLE).argmax(dim=1) != LABELS).double()
    near, _, _ = estimate(50, delta=1e-6)
    torch.testing.assert_close(near.reached, wrong)
    random, _, _ = estimate(50, model=Noisy(2.0))
    assert ((random.reached > 0) & (random.reached < 1)).all()


@pytest.mark.parametrize("loss", [Margin(), CrossEntropy()], ids=repr)
def test_the_estimate_is_right_on_average(loss: Any):
    """Each pixel within five standard errors, as one pair errs by about the length of the gradient; so is its length.

    Of 144 pixels and 1000 pairs the cosine is about (1 + 143 / 1000)^-0.5 = 0.935.
    """
    pairs = 1000
    found, true, _ = estimate(pairs, loss=loss, seed=5)
    slopes, expected = found.gradient.flatten(1), true.gradient.flatten(1)
    deviation = (slopes - expected) / (expected.norm(dim=1, keepdim=True) * pairs**-0.5)
    assert deviation.abs().max() < 5
    assert 0.85 < deviation.square().mean() < 1.15
    assert (torch.nn.functional.cosine_similarity(slopes, expected) > 0.91).all()
    assert ((slopes * expected).sum(dim=1) / expected.square().sum(dim=1) - 1).abs().max() < 5 * (2 / pairs) ** 0.5


@pytest.mark.parametrize("common", [None, True, False])
def test_pairs_are_opposite_directions_of_their_own_with_common_noise_or_not(common: bool | None):
    """Near the image, in the cube, different for each pair, step and image; common noise is the default."""
    model, images = Noisy(), labelled(2, dtype=torch.float64)[0].clamp(0.3, 0.7)
    options: Any = {} if common is None else {"common_noise": common}
    result = SPSA(ThreatModel(eps=1e-9), steps=3, pairs=2, random_start=False, **options)(model, images, LABELS)
    assert len(model.seen) == result.queries == 2 * 6 + 1
    plus, minus = ([part - images for part in model.images[side:-1:2]] for side in (0, 1))
    for first, second in zip(plus, minus, strict=True):
        torch.testing.assert_close(first, -second, rtol=0, atol=1e-8)
        torch.testing.assert_close(first.abs(), torch.full_like(first, 0.01), rtol=0, atol=1e-8)
    assert len({tuple(image.sign().flatten().tolist()) for batch in plus for image in batch}) == 12
    seeds = [tuple(given_seeds.tolist()) for given_seeds in model.seen if given_seeds is not None]
    for first, second in zip(seeds[:-1:2], seeds[1:-1:2], strict=True):
        assert (first == second) == (common is not False)
    assert len(set(seeds)) == (12 if common is False else 6) + 1


def test_common_noise_makes_the_estimate_much_less_noisy_and_no_less_right():
    """One pair each of 150 seeds, on a model whose noise changes the logits by far more than the pair does."""
    spread, centre = {}, {}
    for common in (True, False):
        found = [estimate(1, seed=7 * n, model=toy, common_noise=common)[0].gradient for n in range(150)]
        spread[common] = torch.stack(found).var(dim=0).mean().item()
        centre[common] = torch.stack(found).mean(dim=0)
    true = estimate(1)[1].gradient
    assert spread[False] > 100 * spread[True]
    error = (spread[True] / 150) ** 0.5
    assert (centre[True] - true).abs().max() < 6 * error
    assert (centre[False] - true).abs().max() > 10 * error


def no_autograd(images: Tensor) -> Tensor:
    assert not images.requires_grad
    return torch.from_numpy((images.numpy().reshape(len(images), -1).astype(np.float64) - 0.5) @ WEIGHT.numpy())


def stairs(images: Tensor) -> Tensor:
    """Where the derivative is zero, differences over delta are not."""
    return linear((images * 50).round() / 50)


@pytest.mark.parametrize("model", [no_autograd, stairs])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("aimed", [False, True])
def test_it_beats_models_without_a_gradient(model: Any, norm: str, aimed: bool):
    images, labels = labelled(6)
    targets = (labels + 1) % 4 if aimed else None
    options: Any = {"steps": 15, "pairs": 16, "delta": 0.03 if model is stairs else 0.01}
    result = SPSA(ThreatModel(norm=norm, eps=0.15 if norm == "linf" else 1.5), **options)(
        model, images, labels, targets=targets
    )
    assert result.success.all()
    assert Goal(labels, targets).reached(model(result.images).argmax(dim=1)).all()
    assert (result.history["loss"][-1] > result.history["loss"][0]).all()
