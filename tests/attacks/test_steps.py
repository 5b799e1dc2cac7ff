"""Projected steps: sizes, momentum, directions, starts and what is kept, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import NORMS, SHAPE, THREATS, linear
from cmap_defense.attacks import PGD, Goal, Margin, ThreatModel
from cmap_defense.attacks.oracle import Feedback, Oracle
from cmap_defense.attacks.steps import StepAttack, random_point
from toys import noise, uniform

GREY = torch.full((2, *SHAPE), 0.5)
LABELS = torch.tensor([1, 2])
SLOPE = noise(2, *SHAPE, seed=3)
SEEDS = st.integers(0, 2**31)


class Climber(StepAttack):
    """Climbs a given loss, image by image, and keeps the images that it evaluates."""

    def climbing(self, loss: Callable[[Tensor], Tensor], start: Tensor | None = None) -> Climber:
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "visited", [])
        return self

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Any:
        def feedback(images: Tensor) -> Feedback:
            self.visited.append(images)
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                loss = self.loss(leaf)
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            return Feedback(loss.detach(), gradient, torch.zeros(len(images)))

        return feedback, self.start


def slope(images: Tensor) -> Tensor:
    return (images * SLOPE).flatten(1).sum(dim=1)


def hill(images: Tensor) -> Tensor:
    """A quadratic with another top per image, uneven along its axes."""
    return -((images - 0.5 - 0.05 * SLOPE).square() * SLOPE.abs()).flatten(1).sum(dim=1)


def trail(attack: Climber, loss: Callable[[Tensor], Tensor] = slope, **options: Any) -> tuple[list[Tensor], Tensor]:
    """The images at which the loss was evaluated, and the attempts."""
    result = attack.climbing(loss, **options)(linear, GREY, LABELS)
    return attack.visited, result.candidates


def plain_loop(attack: Climber, sizes: list[float]) -> list[list[Tensor]]:
    """The places of each image alone, in the words of the papers."""
    trails, eps, norm = [], attack.threat.eps, attack.threat.norm
    for image in range(2):
        clean, velocity = GREY[image].clone(), torch.zeros(SHAPE)
        here, places = clean.clone(), [clean.clone()]
        for size in sizes:
            stack = GREY.clone()
            stack[image] = here
            stack.requires_grad_()
            gradient = torch.autograd.grad(hill(stack)[image], stack)[0][image]
            if attack.momentum:
                gradient = velocity = attack.momentum * velocity + gradient / gradient.abs().mean()
            signs = norm == "linf" or attack.sign_steps
            delta = here + size * (gradient.sign() if signs else gradient / gradient.square().sum().sqrt()) - clean
            if norm == "linf":
                delta = delta.clamp(-eps, eps)
            elif delta.norm() > eps:
                delta = delta * eps / delta.norm()
            here = (clean + delta).clamp(0, 1)
            places.append(here)
        trails.append(places)
    return trails


@NORMS
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize(
    ("schedule", "share"), [("constant", None), ("constant", 1 / 3), ("cosine", 0.6), ("cosine", 5)]
)
def test_against_a_plain_loop(norm: str, momentum: float, sign: bool, schedule: str, share: float | None):
    """Without a size, a step is a quarter of eps; steps longer than eps end on the ball."""
    eps = 0.06 if norm == "linf" else 0.5
    options = {"momentum": momentum, "sign_steps": sign, "schedule": schedule, "random_start": False}
    size = None if share is None else share * eps
    attack = Climber(ThreatModel(norm=norm, eps=eps), steps=6, step_size=size, **options)
    sizes = [size or eps / 4] * 6
    if schedule == "cosine":
        sizes = [full * (0.5 + 0.5 * math.cos(math.pi * step / 6)) for step, full in enumerate(sizes)]
    visited, ends = trail(attack, hill)
    expected = plain_loop(attack, sizes)
    assert len(visited) == 6
    for image in range(2):
        for step, place in enumerate([*visited, ends[:, 0]]):
            torch.testing.assert_close(place[image], expected[image][step], rtol=0, atol=2e-6)


@NORMS
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.filterwarnings("error::cmap_defense.errors.GradientWarning")
def test_the_size_of_a_gradient_does_not_matter_to_a_step(norm: str, momentum: float):
    """Squares of 1e30 are beyond float32."""
    options = {"steps": 3, "momentum": momentum, "step_size": 0.1, "random_start": False}
    for loss in (slope, hill):
        attack = Climber(THREATS[norm], **options)
        ends = [trail(attack, lambda images, f=f: f * loss(images))[1] for f in (1.0, 1e-30, 1e30)]  # noqa: B023
        torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-6)
        assert (THREATS[norm].distance(ends[0][:, 0], GREY) > 0.05).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_starts_are_uniform_in_the_ball(dtype: torch.dtype):
    """Mean, variance and both ends, within five standard errors of 28800 draws."""
    clean = torch.full((200, *SHAPE), 0.5, dtype=dtype)
    offset = (random_point(ThreatModel(eps=0.2), torch.arange(200), clean) - clean).double() / 0.2
    error = offset.numel() ** -0.5
    assert offset.abs().max() <= 1 + 1e-6
    assert offset.abs().max() > 0.999
    assert abs(offset.mean().item()) < 5 * error * 3**-0.5
    assert abs(offset.square().mean().item() - 1 / 3) < 5 * error * (4 / 45) ** 0.5
    assert abs((offset < -0.5).double().mean().item() - 0.25) < 5 * error * (3 / 16) ** 0.5


def test_l2_starts_are_on_the_sphere_in_every_direction():
    clean = torch.full((200, *SHAPE), 0.5)
    offset = (random_point(ThreatModel(norm="l2", eps=0.8), torch.arange(200), clean) - clean).double().flatten(1)
    torch.testing.assert_close(offset.norm(dim=1), torch.full((200,), 0.8, dtype=torch.float64), rtol=1e-5, atol=0)
    unit = offset / 0.8
    assert unit.mean(dim=0).abs().max() < 5 * (144 * 200) ** -0.5
    torch.testing.assert_close(unit.square().mean(dim=0), torch.full((144,), 1 / 144).double(), rtol=0, atol=0.006)
    overlap = unit @ unit.T - torch.eye(200)
    assert overlap.abs().max() < 0.5


@settings(max_examples=30)
@given(seed=SEEDS, norm=st.sampled_from(["linf", "l2"]), eps=st.sampled_from([0.0, 0.05, 0.5, 1.0]))
def test_starts_are_legal_near_the_edge_of_the_cube(seed: int, norm: str, eps: float):
    clean = (1.4 * uniform(3, *SHAPE, seed=seed) - 0.2).clamp(0, 1)
    threat = ThreatModel(norm=norm, eps=eps)
    start = random_point(threat, torch.tensor([seed, 1, 2]), clean)
    assert start.min() >= 0
    assert start.max() <= 1
    assert (threat.distance(start, clean) <= eps * (1 + 1e-6)).all()
    alone = random_point(threat, torch.tensor([1]), clean[1:2])
    torch.testing.assert_close(alone, start[1:2], rtol=0, atol=1e-6)
    if eps:
        assert (start != clean).flatten(1).any(dim=1).all()


@NORMS
def test_a_random_start_is_taken_and_a_start_that_is_known_wins(norm: str):
    threat = THREATS[norm]
    (first, *_), _ = trail(Climber(threat, steps=1))
    assert (threat.distance(first, GREY) > 0.5 * threat.eps).all()
    (second, *_), _ = trail(Climber(threat, steps=1, seed=1))
    assert (first - second).abs().max() > 1e-2
    known = GREY + 0.01 * SLOPE
    for random in (True, False):
        (given_start, *_), _ = trail(Climber(threat, steps=1, random_start=random), start=known)
        torch.testing.assert_close(given_start, threat.project(known, GREY))
    (outside, *_), _ = trail(Climber(threat, steps=1), start=GREY + 0.4 * SLOPE.sign())
    torch.testing.assert_close(threat.distance(outside, GREY), torch.full((2,), threat.eps))


@settings(max_examples=15)
@given(seed=SEEDS, steps=st.integers(1, 8))
def test_best_is_the_place_of_the_highest_loss_of_each_image(seed: int, steps: int):
    weights = noise(2, *SHAPE, seed=seed)

    def waves(images: Tensor) -> Tensor:
        return (40 * (images * weights)).sin().flatten(1).sum(dim=1)

    attack = Climber(ThreatModel(eps=0.2), steps=steps, keep="best", seed=seed, step_size=0.1)
    visited, ends = trail(attack, waves)
    assert ends.shape == (2, 2, *SHAPE)
    losses = torch.stack([waves(place) for place in visited])
    for image in range(2):
        torch.testing.assert_close(ends[image, 0], visited[losses[:, image].argmax()][image], rtol=0, atol=2e-7)
    last = Climber(ThreatModel(eps=0.2), steps=steps, seed=seed, step_size=0.1)
    visited_again, only = trail(last, waves)
    assert only.shape == (2, 1, *SHAPE)
    assert torch.equal(only[:, 0], ends[:, 1])
    for here, there in zip(visited, visited_again, strict=True):
        assert torch.equal(here, there)


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
def test_on_a_linear_margin_it_finds_what_can_be_found(norm: str, aimed: bool):
    """Of two classes the best point of the ball is known in closed form; success is as that point says."""

    def two(images: Tensor) -> Tensor:
        return linear(images)[:, :2]

    images = 0.3 + 0.4 * uniform(60, *SHAPE, seed=8)
    labels = two(images).argmax(dim=1)
    difference = (linear(torch.eye(144).view(-1, *SHAPE)) - linear(torch.zeros(1, *SHAPE)))[:, :2].double()
    weight = difference[:, 0] - difference[:, 1]
    scores = two(images)
    lead = (scores[:, 0] - scores[:, 1]).abs()
    eps = 0.008 if norm == "linf" else 0.08
    reach = eps * (weight.abs().sum() if norm == "linf" else weight.norm())
    possible = lead < reach
    assert 5 < possible.sum() < 55
    clear = (lead - reach).abs() > 0.01 * reach
    attack = PGD(ThreatModel(norm=norm, eps=eps), steps=20, loss=Margin(), schedule="cosine")
    result = attack(two, images, labels, targets=1 - labels if aimed else None)
    assert torch.equal(result.success[clear], possible[clear])
