"""The goal of an attack, and the laws of its losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.attacks import CrossEntropy, Goal, Loss, Margin, VoteMargin
from cmap_defense.attacks.goal import margin
from toys import noise, uniform

SEEDS = st.integers(0, 2**31)
CLASSES = st.integers(2, 6)
LOSSES = [CrossEntropy(), Margin(), VoteMargin()]
EVERY = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def drawn(seed: int, classes: int, samples: int, count: int = 3, aimed: bool = False) -> tuple[Tensor, Goal]:
    """Logits [S, B, classes] in float64 and a goal; targets differ from labels."""
    logits = 3 * noise(samples, count, classes, seed=seed, dtype=torch.float64)
    labels = (uniform(count, seed=seed + 1) * classes).long()
    shift = 1 + (uniform(count, seed=seed + 2) * (classes - 1)).long()
    return logits, Goal(labels, (labels + shift) % classes if aimed else None)


@settings(max_examples=60)
@given(seed=SEEDS, classes=CLASSES, aimed=st.booleans())
def test_margin_is_the_lead_written_out_and_positive_where_the_goal_is_reached(seed: int, classes: int, aimed: bool):
    logits, goal = drawn(seed, classes, 1, count=8, aimed=aimed)
    for image, row in enumerate(logits[0].tolist()):
        own = (goal.labels if goal.targets is None else goal.targets)[image].item()
        best = max(value for place, value in enumerate(row) if place != own)
        expected = best - row[own] if goal.targets is None else row[own] - best
        assert margin(logits[0], goal)[image].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(margin(logits[0], goal) > 0, goal.reached(logits[0].argmax(dim=1)))
    if classes == 2:
        assert torch.equal(margin(logits[0], Goal(goal.labels)), margin(logits[0], Goal(goal.labels, 1 - goal.labels)))


@settings(max_examples=40)
@given(seed=SEEDS, classes=CLASSES, samples=st.integers(1, 5), aimed=st.booleans())
def test_losses_written_out(seed: int, classes: int, samples: int, aimed: bool):
    """The vote margin is the log odds of the mean probability; of equal samples it is the margin of one."""
    logits, goal = drawn(seed, classes, samples, aimed=aimed)
    own, sign = (goal.labels, 1) if goal.targets is None else (goal.targets, -1)
    entropy = sign * F.cross_entropy(logits.flatten(0, 1), own.repeat(samples), reduction="none").view(samples, -1)
    torch.testing.assert_close(CrossEntropy()(logits, goal), entropy.mean(dim=0))
    margins = torch.stack([margin(one, goal) for one in logits])
    torch.testing.assert_close(Margin()(logits, goal), margins.mean(dim=0))
    for image, row in enumerate(logits.softmax(dim=-1).mean(dim=0).tolist()):
        best = max(value for place, value in enumerate(row) if place != own[image])
        expected = math.log(best / row[own[image]]) * sign
        assert VoteMargin()(logits, goal)[image].item() == pytest.approx(expected, abs=1e-8)
    torch.testing.assert_close(VoteMargin()(logits[:1].expand(samples, -1, -1), goal), margins[0])
    assert [loss.joint for loss in LOSSES] == [False, False, True]


@EVERY
@settings(max_examples=25)
@given(seed=SEEDS, classes=CLASSES, samples=st.integers(1, 5), aimed=st.booleans())
def test_laws_of_all_losses(loss: Loss, seed: int, classes: int, samples: int, aimed: bool):
    """No matter the order of the samples, a constant on the logits, or other images; and the right gradient."""
    logits, goal = drawn(seed, classes, samples, aimed=aimed)
    whole = loss(logits, goal)
    assert whole.shape == (3,)
    torch.testing.assert_close(loss(logits.roll(1, dims=0), goal), whole, rtol=1e-12, atol=1e-12)
    shift = 10 * noise(samples, 3, 1, seed=seed + 5, dtype=torch.float64)
    torch.testing.assert_close(loss(logits + shift, goal), whole, rtol=1e-9, atol=1e-9)
    for rows in (torch.tensor([1]), torch.tensor([2, 0])):
        torch.testing.assert_close(loss(logits[:, rows], goal.rows(rows)), whole[rows])
    torch.testing.assert_close(loss(logits[:, 1:2], goal.rows(slice(1, 2))), whole[1:2])
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, goal).sum(), leaf)
    direction = noise(*logits.shape, seed=seed + 6, dtype=torch.float64)
    ends = [loss(logits + sign * 1e-6 * direction, goal).sum().item() for sign in (1, -1)]
    assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-6)
    assert gradient.abs().sum() > 0


@EVERY
@pytest.mark.parametrize("aimed", [False, True])
def test_to_climb_is_to_come_nearer(loss: Loss, aimed: bool):
    logits, goal = drawn(3, 4, 2, aimed=aimed)
    wanted = (goal.labels + 1) % 4 if goal.targets is None else goal.targets
    nearer = logits + 2 * F.one_hot(wanted, 4) - (0 if aimed else 2 * F.one_hot(goal.labels, 4))
    assert (loss(nearer, goal) > loss(logits, goal)).all()


def test_margin_does_not_go_flat_where_the_cross_entropy_does():
    logits = torch.tensor([[[100.0, 0.0, -5.0]]]).requires_grad_()
    goal = Goal(torch.tensor([0]))
    flat, steep = (torch.autograd.grad(loss(logits, goal).sum(), logits)[0] for loss in (CrossEntropy(), Margin()))
    assert flat.abs().max() < 1e-30
    assert steep.tolist() == [[[-1.0, 1.0, 0.0]]]
    sure = torch.autograd.grad(VoteMargin()(logits, goal).sum(), logits)[0]
    torch.testing.assert_close(sure, steep)


@settings(max_examples=20)
@given(seed=SEEDS, times=st.integers(1, 4), aimed=st.booleans())
def test_repeated_goals_belong_to_flattened_attempts(seed: int, times: int, aimed: bool):
    logits, goal = drawn(seed, 4, times, aimed=aimed)
    flat = margin(logits.transpose(0, 1).flatten(0, 1), goal.repeated(times)).view(-1, times)
    expected = torch.stack([margin(one, goal) for one in logits], dim=1)
    assert torch.equal(flat, expected)


@EVERY
def test_a_class_that_is_ruled_out_leaves_the_gradient_finite(loss: Loss) -> None:
    """Classifiers rule classes out by a logit of minus infinity."""
    logits, _ = drawn(3, 5, 4)
    logits = logits.index_fill(2, torch.tensor([4]), -torch.inf).requires_grad_()
    value = loss(logits, Goal(torch.tensor([0, 1, 3])))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[..., :4] != 0).any()
