"""Averaged weights: the half-life, the start, and that they are copies in float32; the target that follows a model."""

import pytest
import torch
from torch import nn

from cmap_defense.training.ema import EMA, Target
from toys import noise
from training.killed import fresh_backbone

LATE = 10**9
"""So many images seen that the start plays no part."""


def module(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """3 x 2 weights and 2 biases, all equal to ``value``."""
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        for p in linear.parameters():
            p.fill_(value)
    return linear.to(dtype)


def test_it_starts_as_a_copy_of_the_weights() -> None:
    linear = module(2.0)
    ema = EMA(linear, 100)
    with torch.no_grad():
        linear.weight.fill_(7.0)
    assert sorted(ema.weights) == ["bias", "weight"]
    assert (ema.weights["weight"] == 2.0).all()
    assert not ema.weights["weight"].requires_grad


@pytest.mark.parametrize("batch_size", [1, 10, 100, 400])
def test_the_distance_halves_within_a_half_life_of_images(batch_size: int) -> None:
    """From 1 towards 0: 400 images at a half-life of 100 leave 1/16, in batches of any size."""
    linear = module(1.0)
    ema = EMA(linear, 100)
    with torch.no_grad():
        for p in linear.parameters():
            p.zero_()
    for _ in range(400 // batch_size):
        ema.update(linear, batch_size=batch_size, images_seen=LATE)
    for average in ema.weights.values():
        torch.testing.assert_close(average, torch.full_like(average, 1 / 16), rtol=1e-4, atol=0)


def test_it_is_the_weighted_sum_of_all_weights_seen() -> None:
    linear = nn.Linear(3, 2)
    ema = EMA(linear, 50)
    expected = linear.weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            linear.weight.copy_(noise(2, 3, seed=step))
        keep = 0.5 ** (8 / min(50, (step + 1) * 8 / 20)) if (step + 1) * 8 / 20 > 1 else 0.5**8
        expected = keep * expected + (1 - keep) * linear.weight.detach().double()
        ema.update(linear, batch_size=8, images_seen=(step + 1) * 8)
    torch.testing.assert_close(ema.weights["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_at_the_start_the_half_life_is_a_twentieth_of_the_images_seen() -> None:
    linear = module(1.0)
    ema = EMA(linear, 10**6)
    with torch.no_grad():
        linear.weight.zero_()
    ema.update(linear, batch_size=50, images_seen=2000)  # half-life 100
    torch.testing.assert_close(ema.weights["weight"], torch.full((2, 3), 0.5**0.5))


def test_averages_of_bfloat16_weights_are_float32() -> None:
    """At a half-life of 10^4 images one step moves by 7e-5 of the distance, which bfloat16 would round away."""
    linear = module(1.0, torch.bfloat16)
    ema = EMA(linear, 10**4)
    with torch.no_grad():
        linear.weight.zero_()
    ema.update(linear, batch_size=1, images_seen=LATE)
    assert ema.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["weight"], torch.full((2, 3), 0.5**1e-4), rtol=1e-6, atol=0)


def test_the_module_is_left_alone_by_update_and_overwritten_by_copy_to() -> None:
    linear = module(1.0)
    ema = EMA(linear, 100)
    with torch.no_grad():
        linear.weight.fill_(3.0)
    ema.update(linear, batch_size=100, images_seen=LATE)
    assert (linear.weight == 3.0).all()
    ema.copy_to(linear)
    torch.testing.assert_close(linear.weight.detach(), torch.full((2, 3), 2.0))
    assert (linear.bias == 1.0).all()
    assert linear.weight.requires_grad


def test_it_continues_from_saved_averages() -> None:
    linear = nn.Linear(3, 2)
    ema, fresh = EMA(linear, 100), EMA(module(9.0), 100)
    fresh.load(ema.weights)
    for name, average in ema.weights.items():
        assert torch.equal(fresh.weights[name], average)
        assert fresh.weights[name].data_ptr() != average.data_ptr()


def test_a_missing_average_is_an_error() -> None:
    ema = EMA(nn.Linear(3, 2), 100)
    with pytest.raises(KeyError, match="bias"):
        ema.load({"weight": torch.zeros(2, 3)})


def test_averages_of_several_half_lives_do_not_disturb_each_other() -> None:
    linear = module(1.0)
    averages = [EMA(linear, half_life) for half_life in (100, 50, 25)]
    with torch.no_grad():
        for p in linear.parameters():
            p.zero_()
    for average in averages:
        average.update(linear, batch_size=100, images_seen=LATE)
    for average, expected in zip(averages, (0.5, 0.25, 0.0625), strict=True):
        torch.testing.assert_close(average.weights["weight"], torch.full((2, 3), expected))


# --- the target -------------------------------------------------------------------------------------------------------


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
    with torch.no_grad():
        for p in backbone.parameters():
            p.fill_(1.0)
    target = Target(backbone, 0.9)
    assert target.model is not backbone
    assert not any(p.requires_grad for p in target.model.parameters())
    assert all(p.requires_grad for p in backbone.parameters())
    with torch.no_grad():
        for p in backbone.parameters():
            p.fill_(3.0)
    assert all((p == 1.0).all() for p in target.model.parameters())
    target.update(backbone, 0.75)
    for p in target.model.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 1.5))
    target.update(backbone, 0.0)
    assert all((p == 3.0).all() for p in target.model.parameters())


def test_a_target_continues_from_what_was_saved() -> None:
    saved = {name: 2 * tensor.clone() for name, tensor in Target(fresh_backbone(seed=1), 0.9).weights.items()}
    target = Target(fresh_backbone(seed=2), 0.9)
    target.load(saved)
    for name, p in target.model.named_parameters():
        assert torch.equal(p, saved[name])
        assert p.data_ptr() != saved[name].data_ptr()
    with pytest.raises(KeyError, match="embed"):
        target.load({})
