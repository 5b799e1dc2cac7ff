"""SPSA: a gradient from queries alone, right on average, of models that have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import SHAPE, THREATS, WEIGHT, Noisy, labelled, linear, wrapped
from cmap_defense.attacks import SPSA, CrossEntropy, Goal, Margin, ThreatModel, VoteMargin
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import Detached
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
    """What SPSA is told at some images, and the true gradient of the same loss."""
    attack = SPSA(ThreatModel(), pairs=pairs, **options)
    oracle, goal = Oracle(model, torch.tensor([seed, seed + 1])), Goal(LABELS)
    feedback, start = attack.begin(oracle, images, goal)
    assert start is None
    return feedback(images), Oracle(two, torch.arange(2)).feedback(images, goal, attack.loss, 1), oracle


@pytest.mark.parametrize("loss", [Margin(), CrossEntropy()], ids=repr)
def test_many_pairs_point_along_the_gradient(loss: Any):
    """Of 144 pixels and 1500 pairs the cosine is about (1 + 143 / 1500)^-0.5 = 0.955."""
    told, true, _ = estimate(1500, loss=loss)
    cosine = torch.nn.functional.cosine_similarity(told.gradient.flatten(1), true.gradient.flatten(1))
    assert (cosine > 0.935).all()
    share = (told.gradient * true.gradient).flatten(1).sum(dim=1) / true.gradient.flatten(1).square().sum(dim=1)
    assert (share - 1).abs().max() < 5 * (2 / 1500) ** 0.5


def test_the_estimate_is_right_on_average():
    """Each pixel within five standard errors: one pair errs by about the length of the gradient."""
    pairs = 1500
    told, true, _ = estimate(pairs, seed=5)
    error = true.gradient.flatten(1).norm(dim=1)[:, None, None, None] * pairs**-0.5
    deviation = (told.gradient - true.gradient) / error
    assert deviation.abs().max() < 5
    assert 0.9 < deviation.square().mean() < 1.1


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), delta=st.sampled_from([1e-3, 0.01, 0.05]))
def test_one_pair_is_the_slope_along_a_direction_of_ones(seed: int, delta: float):
    told, true, _ = estimate(1, seed=seed, delta=delta)
    direction = told.gradient.sign()
    slope = (true.gradient * direction).flatten(1).sum(dim=1)
    expected = slope.abs()[:, None, None, None].expand_as(direction)
    torch.testing.assert_close(told.gradient.abs(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(told.gradient, direction * expected)
    assert (slope > 0).all()
    torch.testing.assert_close(told.loss, true.loss)
    assert (direction > 0).flatten(1).sum(dim=1).min() > 40


def test_directions_differ_from_pair_to_pair_from_step_to_step_and_from_image_to_image():
    seen: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        seen.append((images - MIDDLE).sign())
        return linear(images)

    attack = SPSA(ThreatModel(eps=1e-9), steps=3, pairs=2, random_start=False)
    attack(model, MIDDLE, LABELS)
    plus, minus = seen[:-1:2], seen[1:-1:2]
    assert len(plus) == len(minus) == 6
    for first, second in zip(plus, minus, strict=True):
        assert torch.equal(first, -second)
    patterns = {tuple(image.flatten().tolist()) for batch in plus for image in batch}
    assert len(patterns) == 12


def test_queries_stay_in_the_cube():
    seen: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        seen.append(images)
        return linear(images)

    images = labelled(2)[0].round()
    SPSA(ThreatModel(eps=0.1), steps=2, pairs=2, delta=0.2)(model, images, LABELS)
    assert min(part.min() for part in seen) == 0
    assert max(part.max() for part in seen) == 1
    assert all((part - images).abs().max() <= 0.3 + 1e-6 for part in seen)


def test_loss_and_reached_are_means_over_all_queries():
    told, true, oracle = estimate(50)
    assert oracle.count == 100
    torch.testing.assert_close(told.loss, true.loss, rtol=0, atol=1e-9)
    wrong = (two(MIDDLE).argmax(dim=1) != LABELS).double()
    near, _, _ = estimate(50, delta=1e-6)
    torch.testing.assert_close(near.reached, wrong)
    random, _, _ = estimate(50, model=Noisy(2.0))
    assert ((random.reached > 0) & (random.reached < 1)).all()


@pytest.mark.parametrize("options", [{}, {"common_noise": True}, {"common_noise": False}], ids=repr)
def test_both_sides_of_a_pair_see_the_same_noise_unless_told(options: dict[str, bool]):
    model, pairs = Noisy(), 2 * 3
    result = SPSA(ThreatModel(), steps=2, pairs=3, **options)(model, MIDDLE, LABELS)
    seeds = [tuple(given_seeds.tolist()) for given_seeds in model.seen if given_seeds is not None]
    assert len(seeds) == result.queries == 2 * pairs + 1
    common = options.get("common_noise", True)
    for plus, minus in zip(seeds[:-1:2], seeds[1:-1:2], strict=True):
        assert (plus == minus) == common
    assert len(set(seeds)) == (pairs if common else 2 * pairs) + 1
    for plus, minus in zip(model.images[:-1:2], model.images[1:-1:2], strict=True):
        torch.testing.assert_close((plus - minus).abs(), torch.full_like(plus, 0.02), rtol=0, atol=1e-9)


def test_a_wrapper_sees_the_same_noise_on_both_sides_as_well():
    """With sides that are all but one image, the answers of a pair are one; without, they are as far apart as ever."""
    images, labels = labelled(2)
    slopes = {}
    for common in (True, False):
        attack = SPSA(ThreatModel(), pairs=4, delta=1e-3, common_noise=common)
        feedback, _ = attack.begin(Oracle(wrapped(vote="soft"), torch.arange(2)), images, Goal(labels))
        slopes[common] = feedback(images).gradient.abs().mean()
    assert slopes[False] > 10 * slopes[True]


def test_common_noise_makes_the_estimate_much_less_noisy_and_no_less_right():
    """One pair each of 300 seeds, on a model whose noise changes the answer by far more than the pair does."""
    spread, centre = {}, {}
    for common in (True, False):
        told = [estimate(1, seed=7 * n, model=toy, common_noise=common)[0].gradient for n in range(300)]
        spread[common] = torch.stack(told).var(dim=0).mean().item()
        centre[common] = torch.stack(told).mean(dim=0)
    true = estimate(1)[1].gradient
    assert spread[False] > 100 * spread[True]
    error = (spread[True] / 300) ** 0.5
    assert (centre[True] - true).abs().max() < 6 * error
    assert (centre[False] - true).abs().max() > 10 * error


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("aimed", [False, True])
def test_it_beats_a_model_that_has_no_gradient_at_all(norm: str, aimed: bool):
    weight = WEIGHT.numpy()

    def model(images: Tensor) -> Tensor:
        assert not images.requires_grad
        return torch.from_numpy((images.numpy().reshape(len(images), -1).astype(np.float64) - 0.5) @ weight)

    images, labels = labelled(6)
    targets = (labels + 1) % 4 if aimed else None
    attack = SPSA(ThreatModel(norm=norm, eps=0.15 if norm == "linf" else 1.5), steps=15, pairs=16)
    result = attack(model, images, labels, targets=targets)
    assert result.success.all()
    answer = linear(result.images).argmax(dim=1)
    assert torch.equal(answer, targets) if targets is not None else (answer != labels).all()
    assert (result.history["loss"][-1] > result.history["loss"][0]).all()


def test_it_works_where_a_gradient_is_refused():
    images, labels = labelled(2)
    result = SPSA(THREATS["linf"], steps=3, pairs=4)(wrapped(gradient=Detached()), images, labels)
    assert (result.distance > 0).all()


def test_it_works_on_a_flat_staircase():
    """Where the derivative is zero, differences over delta are not."""

    def stairs(images: Tensor) -> Tensor:
        return linear((images * 50).round() / 50)

    images, labels = labelled(6)
    result = SPSA(ThreatModel(eps=0.1), steps=15, pairs=16, delta=0.03)(stairs, images, labels)
    assert result.success.all()


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 0},
        {"pairs": 1.5},
        {"delta": 0.0},
        {"delta": -0.01},
        {"delta": "small"},
        {"common_noise": 1},
        {"common_noise": None},
        {"loss": VoteMargin()},
        {"loss": "margin"},
        {"loss": None},
    ],
    ids=repr,
)
def test_wrong_settings_are_refused_by_name(change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"SPSA.{name}"):
        SPSA(ThreatModel(), **change)
