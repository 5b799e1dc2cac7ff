"""Projected steps: sizes, momentum, directions, starts and what is kept, against plain loops."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import SHAPE, THREATS, labelled, linear
from cmap_defense.attacks import PGD, SPSA, Attack, Goal, Margin, ThreatModel, Transfer
from cmap_defense.attacks.oracle import Feedback, Oracle
from cmap_defense.attacks.steps import StepAttack, random_point
from cmap_defense.errors import CmapError, GradientWarning, SettingsError
from toys import noise, uniform

GREY = torch.full((2, *SHAPE), 0.5)
LABELS = torch.tensor([1, 2])
SLOPE = noise(2, *SHAPE, seed=3)
SEEDS = st.integers(0, 2**31)


class Told(StepAttack):
    """Climbs a loss that it is told, image by image, and remembers where it was asked."""

    def told(self, loss: Callable[[Tensor], Tensor], start: Tensor | None = None) -> Told:
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "asked", [])
        return self

    def begin(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Any:
        def feedback(images: Tensor) -> Feedback:
            self.asked.append(images)  # pyright: ignore[reportAttributeAccessIssue]
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                loss = self.loss(leaf)  # pyright: ignore[reportAttributeAccessIssue]
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            return Feedback(loss.detach(), gradient, torch.zeros(len(images)))

        return feedback, self.start  # pyright: ignore[reportAttributeAccessIssue]


def slope(images: Tensor) -> Tensor:
    return (images * SLOPE).flatten(1).sum(dim=1)


def hill(images: Tensor) -> Tensor:
    """A quadratic with another top per image, uneven along its axes."""
    return -((images - 0.5 - 0.05 * SLOPE).square() * SLOPE.abs()).flatten(1).sum(dim=1)


def trail(attack: Told, loss: Callable[[Tensor], Tensor] = slope, **options: Any) -> tuple[list[Tensor], Tensor]:
    """Where the loss was asked, and the end."""
    result = attack.told(loss, **options)(linear, GREY, LABELS)
    return attack.asked, result.candidates  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------------------------------------------------------- sizes


@settings(max_examples=20)
@given(steps=st.integers(1, 8), norm=st.sampled_from(["linf", "l2"]), schedule=st.sampled_from(["constant", "cosine"]))
def test_sizes_of_steps(steps: int, norm: str, schedule: str):
    """In a ball that is never left, each step is as long as the schedule says."""
    attack = Told(ThreatModel(norm=norm, eps=0.49), steps=steps, step_size=0.01, schedule=schedule, random_start=False)
    asked, ends = trail(attack)
    places = [*asked, ends[:, 0]]
    assert torch.equal(places[0], GREY)
    for step, (here, there) in enumerate(itertools.pairwise(places)):
        share = 1.0 if schedule == "constant" else (1 + math.cos(math.pi * step / steps)) / 2
        length = THREATS[norm].distance(there, here)
        torch.testing.assert_close(length, torch.full((2,), 0.01 * share), rtol=1e-4, atol=1e-7)
    assert len(asked) == steps


def test_the_cosine_starts_whole_passes_a_half_and_falls():
    attack = Told(ThreatModel(eps=0.49), steps=4, step_size=0.08, schedule="cosine", random_start=False)
    sizes = [attack._size(step) for step in range(4)]
    assert sizes == pytest.approx([0.08, 0.04 * (1 + math.sqrt(0.5)), 0.04, 0.04 * (1 - math.sqrt(0.5))])


def test_without_a_size_a_step_is_a_quarter_of_eps():
    attack = Told(ThreatModel(eps=0.2), steps=1, random_start=False)
    _, ends = trail(attack)
    torch.testing.assert_close(ends[:, 0], GREY + 0.05 * SLOPE.sign())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_long_step_ends_on_the_ball(norm: str):
    _, ends = trail(Told(ThreatModel(norm=norm, eps=0.1), steps=2, step_size=1.0, random_start=False))
    threat = ThreatModel(norm=norm, eps=0.1)
    torch.testing.assert_close(threat.distance(ends[:, 0], GREY), torch.full((2,), 0.1))


# ----------------------------------------------------------------------------------------------------------- directions


def plain_loop(
    loss: Callable[[Tensor], Tensor],
    threat: ThreatModel,
    steps: int,
    *,
    size: float,
    momentum: float,
    sign: bool,
    cosine: bool,
) -> list[list[Tensor]]:
    """Each image alone, in the words of the papers."""
    trails = []
    for image in range(2):
        clean, velocity = GREY[image].clone(), torch.zeros(SHAPE)
        here, places = clean.clone(), [clean.clone()]
        for step in range(steps):
            stack = GREY.clone()
            stack[image] = here
            stack.requires_grad_()
            gradient = torch.autograd.grad(loss(stack)[image], stack)[0][image]
            velocity = momentum * velocity + gradient / gradient.abs().mean() if momentum else gradient
            length = size * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if cosine else size
            if threat.norm == "linf" or sign:
                here = here + length * velocity.sign()
            else:
                here = here + length * velocity / velocity.square().sum().sqrt()
            delta = here - clean
            if threat.norm == "linf":
                delta = delta.clamp(-threat.eps, threat.eps)
            elif delta.norm() > threat.eps:
                delta = delta * threat.eps / delta.norm()
            here = (clean + delta).clamp(0, 1)
            places.append(here)
        trails.append(places)
    return trails


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_against_a_plain_loop(norm: str, momentum: float, sign: bool, cosine: bool):
    threat = ThreatModel(norm=norm, eps=0.06 if norm == "linf" else 0.5)
    options = {"steps": 6, "step_size": threat.eps / 3, "momentum": momentum, "sign_steps": sign}
    attack = Told(threat, random_start=False, schedule="cosine" if cosine else "constant", **options)
    asked, ends = trail(attack, hill)
    expected = plain_loop(hill, threat, 6, size=threat.eps / 3, momentum=momentum, sign=sign, cosine=cosine)
    for image in range(2):
        for step, place in enumerate([*asked, ends[:, 0]]):
            torch.testing.assert_close(place[image], expected[image][step], rtol=0, atol=2e-6)


def test_momentum_changes_the_path_and_is_free_of_the_gradients_size():
    def path(momentum: float, factor: float) -> Tensor:
        attack = Told(THREATS["l2"], steps=5, momentum=momentum, random_start=False, step_size=0.3)
        return trail(attack, lambda images: factor * hill(images))[1]

    assert (path(0.0, 1.0) - path(0.9, 1.0)).abs().max() > 1e-3
    torch.testing.assert_close(path(0.9, 1.0), path(0.9, 1000.0), rtol=0, atol=1e-5)


def test_signs_in_l2_are_steps_of_all_pixels_alike():
    attack = Told(ThreatModel(norm="l2", eps=5.0), steps=1, step_size=0.02, sign_steps=True, random_start=False)
    _, ends = trail(attack)
    torch.testing.assert_close(ends[:, 0], GREY + 0.02 * SLOPE.sign())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_gradient_is_no_step_and_no_division_by_zero(norm: str, momentum: float):
    attack = Told(THREATS[norm], steps=2, momentum=momentum, random_start=False)
    with pytest.warns(GradientWarning, match="2 of 2 images was zero at every step, so that Told") as record:
        _, ends = trail(attack, lambda images: 0 * slope(images))
    assert torch.equal(ends[:, 0], GREY)
    assert len(record) == 1


def test_the_warning_counts_images_whose_gradient_was_never_anything():
    attack = Told(ThreatModel(eps=0.1), steps=2, random_start=False)
    with pytest.warns(GradientWarning, match="1 of 2 images was zero"):
        _, ends = trail(attack, lambda images: torch.tensor([0.0, 1.0]) * slope(images))
    assert torch.equal(ends[0, 0], GREY[0])
    assert not torch.equal(ends[1, 0], GREY[1])


@pytest.mark.parametrize("transferred", [False, True])
def test_the_warning_points_at_the_call_of_the_attack(transferred: bool):
    attack: Attack = Told(ThreatModel(eps=0.1), steps=2, restarts=2).told(lambda images: 0 * slope(images))
    if transferred:
        attack = Transfer(attack, source=linear)
    with pytest.warns(GradientWarning) as record:
        attack(linear, GREY, LABELS)
    assert [one.filename for one in record] == [__file__]


def test_a_tiny_gradient_is_a_gradient():
    attack = Told(ThreatModel(eps=0.1), steps=2, step_size=0.05, random_start=False)
    _, ends = trail(attack, lambda images: 1e-30 * slope(images))
    torch.testing.assert_close(ends[:, 0], GREY + 0.1 * SLOPE.sign())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.filterwarnings("ignore::cmap_defense.errors.GradientWarning")
def test_the_size_of_a_gradient_does_not_matter_to_a_step(size: float, momentum: float):
    """Squares of 1e30 are beyond float32."""
    options = {"steps": 3, "momentum": momentum, "step_size": 0.1, "random_start": False}
    _, ends = trail(Told(THREATS["l2"], **options), lambda images: size * hill(images))
    _, expected = trail(Told(THREATS["l2"], **options), hill)
    torch.testing.assert_close(ends, expected, rtol=0, atol=1e-6)
    assert (THREATS["l2"].distance(ends[:, 0], GREY) > 0.05).all()


def test_a_gradient_that_is_zero_at_first_alone_is_no_reason_to_warn():
    calls: list[int] = []

    def late(images: Tensor) -> Tensor:
        calls.append(1)
        return (len(calls) > 1) * slope(images)

    attack = Told(ThreatModel(eps=0.1), steps=2, random_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, ends = trail(attack, late)
    assert (ends[:, 0] != GREY).flatten(1).any(dim=1).all()


# --------------------------------------------------------------------------------------------------------------- starts


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


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_is_taken_and_a_start_that_is_known_wins(norm: str):
    threat = THREATS[norm]
    (first, *_), _ = trail(Told(threat, steps=1))
    assert (threat.distance(first, GREY) > 0.5 * threat.eps).all()
    (second, *_), _ = trail(Told(threat, steps=1, seed=1))
    assert (first - second).abs().max() > 1e-2
    known = GREY + 0.01 * SLOPE
    for random in (True, False):
        (given_start, *_), _ = trail(Told(threat, steps=1, random_start=random), start=known)
        torch.testing.assert_close(given_start, threat.project(known, GREY))
    (outside, *_), _ = trail(Told(threat, steps=1), start=GREY + 0.4 * SLOPE.sign())
    torch.testing.assert_close(threat.distance(outside, GREY), torch.full((2,), threat.eps))


# ----------------------------------------------------------------------------------------------------------------- kept


@settings(max_examples=15)
@given(seed=SEEDS, steps=st.integers(1, 8))
def test_best_is_the_place_of_the_highest_loss_of_each_image(seed: int, steps: int):
    weights = noise(2, *SHAPE, seed=seed)

    def waves(images: Tensor) -> Tensor:
        return (40 * (images * weights)).sin().flatten(1).sum(dim=1)

    attack = Told(ThreatModel(eps=0.2), steps=steps, keep="best", seed=seed, step_size=0.1)
    asked, ends = trail(attack, waves)
    assert ends.shape == (2, 2, *SHAPE)
    losses = torch.stack([waves(place) for place in asked])
    for image in range(2):
        torch.testing.assert_close(ends[image, 0], asked[losses[:, image].argmax()][image], rtol=0, atol=2e-7)
    last = Told(ThreatModel(eps=0.2), steps=steps, seed=seed, step_size=0.1)
    asked_again, only = trail(last, waves)
    assert only.shape == (2, 1, *SHAPE)
    assert torch.equal(only[:, 0], ends[:, 1])
    for here, there in zip(asked, asked_again, strict=True):
        assert torch.equal(here, there)


def test_best_is_not_always_last():
    _, ends = trail(Told(ThreatModel(eps=0.3), steps=9, keep="best", step_size=0.2, random_start=False), hill)
    assert (hill(ends[:, 0]) > hill(ends[:, 1]) + 0.1).all()


def test_history_is_what_was_heard():
    attack = Told(ThreatModel(eps=0.2), steps=5).told(hill)
    result = attack(linear, GREY, LABELS)
    asked: list[Tensor] = attack.asked  # pyright: ignore[reportAttributeAccessIssue]
    assert set(result.history) == {"loss", "gradient_norm", "reached"}
    torch.testing.assert_close(result.history["loss"], torch.stack([hill(place) for place in asked]))
    for step, place in enumerate(asked):
        gradient = -2 * (place - 0.5 - 0.05 * SLOPE) * SLOPE.abs()
        torch.testing.assert_close(result.history["gradient_norm"][step], gradient.flatten(1).norm(dim=1))


def test_reached_is_the_share_of_wrong_answers_on_the_way():
    images, labels = labelled(20)
    result = PGD(ThreatModel(eps=0.03), steps=8, random_start=False, eot=2)(linear, images, labels)
    reached = result.history["reached"]
    assert reached[0].sum() == 0
    assert 0 < reached[-1].sum() < 20
    assert set(reached.flatten().tolist()) == {0.0, 1.0}


# ------------------------------------------------------------------------------------------------------------- strength


@pytest.mark.parametrize("norm", ["linf", "l2"])
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


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": -1},
        {"steps": 2.0},
        {"steps": True},
        {"step_size": -0.1},
        {"step_size": float("nan")},
        {"step_size": "1/255"},
        {"schedule": "linear"},
        {"schedule": None},
        {"random_start": 1},
        {"random_start": "yes"},
        {"momentum": -0.1},
        {"momentum": float("inf")},
        {"sign_steps": 0},
        {"keep": "first"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("attack", [PGD, SPSA])
def test_wrong_settings_are_refused_by_name(attack: type[StepAttack], change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"{attack.__name__}.{name}"):
        attack(ThreatModel(), **change)


@pytest.mark.parametrize(
    "change",
    [{"eot": 0}, {"eot": 1.0}, {"loss": "margin"}, {"loss": Margin}, {"gradient": "bpda"}, {"gradient": PGD}],
    ids=repr,
)
def test_wrong_settings_of_pgd_are_refused_by_name(change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"PGD.{name}"):
        PGD(ThreatModel(), **change)


def test_options_go_by_name():
    with pytest.raises(TypeError):
        PGD(ThreatModel(), 3)  # pyright: ignore[reportCallIssue]
    with pytest.raises((TypeError, CmapError)):
        PGD()  # pyright: ignore[reportCallIssue]
