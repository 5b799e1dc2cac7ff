"""CompactUNet: shapes, independence of the images of a batch, derivatives, its start, its config."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import SettingsError
from toys import noise

SEEDS = st.integers(0, 2**31)


@st.composite
def configs(draw: st.DrawFn) -> CompactUNetConfig:
    levels = draw(st.integers(1, 2))
    patch = draw(st.integers(1, 2))
    unit = patch * 2 ** (levels - 1)
    sides = (unit * draw(st.integers(2, 3)), unit * draw(st.integers(2, 4)))
    return CompactUNetConfig(
        image_shape=(draw(st.integers(1, 3)), *sides),
        patch=patch,
        channels=tuple(draw(st.lists(st.sampled_from([4, 8, 12]), min_size=levels, max_size=levels))),
        blocks=draw(st.integers(1, 2)),
        attention=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        head_channels=draw(st.sampled_from([2, 4, 32])),
        embedding=draw(st.integers(4, 17)),
    )


SMALL = CompactUNetConfig(
    image_shape=(3, 8, 4), channels=(4, 8), blocks=1, attention=(False, True), head_channels=4, embedding=8
)


def awake(config: CompactUNetConfig, seed: int = 1, dtype: torch.dtype = torch.float64) -> CompactUNet:
    """A network whose layers are all away from zero."""
    with torch.random.fork_rng(devices=[]):
        network = CompactUNet(config).to(dtype).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(network.named_parameters()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.copy_(noise(*parameter.shape, seed=seed + index, dtype=dtype) / fan_in**0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return network


def inputs(config: CompactUNetConfig, batch: int, seed: int, dtype: torch.dtype = torch.float64):
    """Images [B, C, H, W] and noise levels [B] of the size that ln(sigma) / 4 has."""
    return noise(batch, *config.image_shape, seed=seed, dtype=dtype), 0.7 * noise(batch, seed=seed + 1, dtype=dtype)


@settings(deadline=None, max_examples=20)
@given(config=configs(), batch=st.integers(2, 3), seed=SEEDS)
def test_output_is_shaped_like_the_input_and_finite(config: CompactUNetConfig, batch: int, seed: int):
    x, level = inputs(config, batch, seed)
    output = awake(config)(x, level)
    assert output.shape == x.shape
    assert torch.isfinite(output).all()


@settings(deadline=None, max_examples=20)
@given(config=configs(), seed=SEEDS)
def test_images_of_a_batch_do_not_see_each_other(config: CompactUNetConfig, seed: int):
    network = awake(config)
    x, level = inputs(config, 3, seed)
    alone = torch.cat([network(x[b : b + 1], level[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(network(x, level), alone, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(config=configs(), seed=SEEDS)
def test_output_depends_on_the_input_and_on_the_noise_level(config: CompactUNetConfig, seed: int):
    network = awake(config)
    x, level = inputs(config, 2, seed)
    output = network(x, level)
    assert not torch.allclose(network(x + 0.5 * noise(*x.shape, seed=seed + 2, dtype=x.dtype), level), output)
    assert not torch.allclose(network(x, level + 0.3), output)


@settings(deadline=None, max_examples=15)
@given(config=configs(), seed=SEEDS)
def test_new_network_is_zero(config: CompactUNetConfig, seed: int):
    with torch.random.fork_rng(devices=[]):
        network = CompactUNet(config)
    x, level = inputs(config, 2, seed, torch.float32)
    assert torch.equal(network(x, level), torch.zeros_like(x))


def test_new_network_learns_though_it_is_zero():
    with torch.random.fork_rng(devices=[]):
        network = CompactUNet(SMALL)
    network(*inputs(SMALL, 2, 1, torch.float32)).sum().backward()
    assert network.leave.weight.grad.abs().max().item() > 0


@settings(deadline=None, max_examples=10)
@given(config=configs(), seed=SEEDS)
def test_second_derivatives_are_finite_and_not_all_zero(config: CompactUNetConfig, seed: int):
    network = awake(config)
    x, level = inputs(config, 2, seed)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, level).square().sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.square().sum(), (x, *network.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in second if g is not None)
    assert second[0].abs().max().item() > 0


def test_first_and_second_derivatives_are_finite_differences():
    config = CompactUNetConfig(
        image_shape=(1, 4, 2), patch=1, channels=(4, 4), blocks=1, attention=(True, True), head_channels=2, embedding=4
    )
    network = awake(config)
    x, level = inputs(config, 2, 3)

    def along(x: Tensor, level: Tensor) -> Tensor:
        return network(x, level).flatten()[::5]

    variables = (x.requires_grad_(), level.requires_grad_())
    assert torch.autograd.gradcheck(along, variables)
    assert torch.autograd.gradgradcheck(along, variables)


def test_image_of_a_single_patch_is_refused_or_works_alone_as_in_a_batch():
    try:
        config = SMALL.replace(image_shape=(3, 4, 4))
    except SettingsError:
        return
    network = awake(config)
    x, level = inputs(config, 2, 7)
    alone = torch.cat([network(x[b : b + 1], level[b : b + 1]) for b in range(2)])
    torch.testing.assert_close(network(x, level), alone, rtol=1e-9, atol=1e-9)


def test_every_parameter_takes_part():
    network = awake(SMALL)
    network(*inputs(SMALL, 2, 4)).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max().item() == 0]
    assert still == []


def test_one_step_generator_of_a_new_network_is_finite_in_bfloat16():
    with torch.random.fork_rng(devices=[]):
        backbone = ConsistencyBackbone(CompactUNet(SMALL), SMALL.image_shape).to(torch.bfloat16)
    images = backbone.generate(noise(2, *SMALL.image_shape, seed=5))
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


def test_dropout_acts_in_training_alone():
    network = awake(SMALL.replace(dropout=0.5))
    x, level = inputs(SMALL, 2, 6)
    assert torch.equal(network(x, level), network(x, level))
    with torch.random.fork_rng(devices=[]):
        network.train()
        assert not torch.equal(network(x, level), network(x, level))


# ----------------------------------------------------------------------------------------------------------- config


@settings(deadline=None, max_examples=40)
@given(config=configs())
def test_config_json_round_trip_is_exact(config: CompactUNetConfig):
    assert CompactUNetConfig.from_json(config.to_json()) == config
    assert CompactUNetConfig.from_dict(config.to_dict()) == config


def test_config_can_be_a_key():
    assert hash(CompactUNetConfig(channels=[48, 96], attention=[False, True])) == hash(CompactUNetConfig())


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("image_shape", {"image_shape": (3, 32)}),
        ("image_shape", {"image_shape": (0, 32, 32)}),
        ("image_shape", {"image_shape": (3, 32.0, 32)}),
        ("image_shape", {"image_shape": (True, 32, 32)}),
        ("image_shape", {"image_shape": 32}),
        ("multiples of 4", {"image_shape": (3, 30, 32)}),
        ("multiples of 4", {"image_shape": (3, 32, 34)}),
        ("patch", {"patch": 0}),
        ("patch", {"patch": 2.0}),
        ("channels", {"channels": ()}),
        ("channels", {"channels": (48, 0)}),
        ("channels", {"channels": (48, -96)}),
        ("channels", {"channels": (48, True)}),
        ("channels", {"channels": "48"}),
        ("channels", {"channels": (), "attention": ()}),
        ("attention", {"attention": (True,)}),
        ("attention", {"attention": (0, 1)}),
        ("attention", {"attention": None}),
        ("blocks", {"blocks": 0}),
        ("blocks", {"blocks": True}),
        ("head_channels", {"head_channels": 0}),
        ("embedding", {"embedding": 3}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
        ("dropout", {"dropout": float("nan")}),
    ],
)
def test_nonsense_config_is_refused_by_name(word: str, values: dict):
    with pytest.raises(SettingsError, match=word):
        CompactUNetConfig(**values)


def test_head_channels_that_do_not_divide_the_channels_are_refused():
    """By the config, before a network is built."""
    with pytest.raises(SettingsError, match="head_channels"):
        CompactUNetConfig(channels=(48, 100), head_channels=32)


def test_unknown_field_names_the_near_match():
    with pytest.raises(SettingsError, match="'channels'"):
        CompactUNetConfig.from_dict({"channel": [48, 96]})
