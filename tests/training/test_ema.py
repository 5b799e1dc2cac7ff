"""Averaged weights: the half-life, the start, and that they are copies in float32; the target that follows a model."""

import pytest
import torch
from torch import nn

from cmap_defense.training.ema import EMA, Target
from toys import noise
from training.trained import fresh_backbone

LATE = 10**9
"""So many images seen that the start plays no part."""


def fill(module: nn.Module, value: float) -> nn.Module:
    """The module, all of whose parameters are equal to ``value`` now."""
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def assert_all(tensors: object, value: float, **tolerance: float) -> None:
    for tensor in tensors:  # pyright: ignore[reportGeneralTypeIssues]
        torch.testing.assert_close(tensor.detach(), torch.full_like(tensor, value), **tolerance)


def test_it_starts_as_a_copy_of_the_weights_and_leaves_the_module_alone() -> None:
    linear = fill(nn.Linear(3, 2), 1.0)
    ema = EMA(linear, 100)
    fill(linear, 3.0)
    assert sorted(ema.weights) == ["bias", "weight"]
    assert_all(ema.weights.values(), 1.0, rtol=0, atol=0)
    assert not ema.weights["weight"].requires_grad
    ema.update(linear, batch_size=100, images_seen=LATE)
    assert_all(linear.parameters(), 3.0, rtol=0, atol=0)
    ema.copy_to(linear)
    assert_all(linear.parameters(), 2.0)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("batch_size", [1, 10, 100, 400])
def test_the_distance_halves_within_a_half_life_of_images(batch_size: int) -> None:
    """From 1 towards 0: 400 images at half-lives of 100 and 200 leave 1/16 and 1/4, in batches of any size."""
    linear = fill(nn.Linear(3, 2), 1.0)
    averages = [EMA(linear, half_life) for half_life in (100, 200)]
    fill(linear, 0.0)
    for _ in range(400 // batch_size):
        for ema in averages:
            ema.update(linear, batch_size=batch_size, images_seen=LATE)
    for ema, expected in zip(averages, (1 / 16, 1 / 4), strict=True):
        assert_all(ema.weights.values(), expected, rtol=1e-4, atol=0)


def test_it_is_the_weighted_sum_of_all_weights_seen() -> None:
    """At the start the half-life is a twentieth of the images seen, and at least one image."""
    linear = nn.Linear(3, 2)
    ema = EMA(linear, 50)
    expected = linear.weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            linear.weight.copy_(noise(2, 3, seed=step))
        keep = 0.5 ** (8 / max(1, min(50, (step + 1) * 8 / 20)))
        expected = keep * expected + (1 - keep) * linear.weight.detach().double()
        ema.update(linear, batch_size=8, images_seen=(step + 1) * 8)
    torch.testing.assert_close(ema.weights["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_without_a_decay_the_target_is_the_model_itself() -> None:
    backbone = fresh_backbone()
    target = Target(backbone, None)
    assert target.model is backbone
    assert target.weights == {}
    target.update(backbone, None)
    target.load({})


def test_with_a_decay_it_is_a_copy_that_follows() -> None:
    """target <- mu target + (1 - mu) model."""
    backbone = fresh_backbone()
    fill(backbone, 1.0)
    target = Target(backbone, 0.9)
    assert target.model is not backbone
    assert not any(p.requires_grad for p in target.model.parameters())
    assert all(p.requires_grad for p in backbone.parameters())
    fill(backbone, 3.0)
    assert_all(target.model.parameters(), 1.0, rtol=0, atol=0)
    target.update(backbone, 0.75)
    assert_all(target.model.parameters(), 1.5)
    target.update(backbone, 0.0)
    assert_all(target.model.parameters(), 3.0, rtol=0, atol=0)
