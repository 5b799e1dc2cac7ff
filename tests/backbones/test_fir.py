"""Resampling by two: the official layers' results, and the laws of a filter and its transpose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.backbones.fir import FIRDown, FIRDownConv, FIRUp
from goldens import FOLDER, arrays, channels_first
from toys import noise

TAPS = (1.0, 3.0, 3.0, 1.0)
SEEDS = st.integers(0, 2**31)
SIZES = st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
"""B, C, and half of H and W."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Results of the official layers."""
    ops = arrays(FOLDER / "ops" / "ops.npz")
    kernel = ops.pop("w_hwio")
    return channels_first(ops) | {"w_hwio": kernel}


@st.composite
def taps(draw: st.DrawFn) -> tuple[float, ...]:
    outer, inner = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    return (outer, inner, inner, outer)


def convolution(inputs: int, outputs: int) -> FIRDownConv:
    """A filtered convolution of fixed weights."""
    with torch.random.fork_rng(devices=[]):
        layer = FIRDownConv(inputs, outputs, TAPS)
    with torch.no_grad():
        layer.conv.weight.copy_(noise(outputs, inputs, 3, 3, seed=8) / (9 * inputs) ** 0.5)
        layer.conv.bias.copy_(noise(outputs, seed=9))
    return layer


def borders(size: int, value: float) -> Tensor:
    """Ones, but for ``value`` at both ends."""
    line = torch.ones(size, dtype=torch.float64)
    line[0], line[-1] = value, value
    return line


@pytest.mark.parametrize(("name", "layer"), [("down2", FIRDown(TAPS)), ("up2", FIRUp(TAPS))])
def test_agrees_with_the_official_layer(recorded: dict[str, Tensor], name: str, layer: torch.nn.Module):
    torch.testing.assert_close(layer(recorded["x"]), recorded[name], rtol=0, atol=5e-7)


def test_filtered_convolution_agrees_with_the_official_layer(recorded: dict[str, Tensor]):
    layer = convolution(6, 5)
    with torch.no_grad():
        layer.conv.weight.copy_(recorded["w_hwio"].permute(3, 2, 0, 1))
        layer.conv.bias.copy_(recorded["b"])
    torch.testing.assert_close(layer(recorded["x"]), recorded["downconv2"], rtol=0, atol=2e-6)


def test_a_constant_stays_constant_away_from_the_border():
    """Zeros outside take 1/8 of it at a border of the small image and 1/4 at one of the large image, per axis."""
    image = torch.full((2, 3, 8, 12), 0.7, dtype=torch.float64)
    down = 0.7 * torch.outer(borders(4, 7 / 8), borders(6, 7 / 8))
    up = 0.7 * torch.outer(borders(16, 3 / 4), borders(24, 3 / 4))
    torch.testing.assert_close(FIRDown(TAPS).double()(image), down.expand(2, 3, -1, -1), rtol=0, atol=1e-14)
    torch.testing.assert_close(FIRUp(TAPS).double()(image), up.expand(2, 3, -1, -1), rtol=0, atol=1e-14)


@settings(max_examples=30)
@given(taps=taps(), sizes=SIZES, seed=SEEDS)
def test_up_is_four_times_the_transpose_of_down(taps: tuple[float, ...], sizes: tuple[int, ...], seed: int):
    batch, channels, height, width = sizes
    x = noise(batch, channels, 2 * height, 2 * width, seed=seed, dtype=torch.float64)
    y = noise(batch, channels, height, width, seed=seed + 1, dtype=torch.float64)
    down, up = FIRDown(taps).double()(x), FIRUp(taps).double()(y)
    assert down.shape == y.shape
    assert up.shape == x.shape
    torch.testing.assert_close((down * y).sum(), (x * up).sum() / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [FIRDown(TAPS), FIRUp(TAPS)])
def test_every_channel_is_filtered_alone(layer: torch.nn.Module):
    x = noise(2, 3, 6, 4, seed=1)
    alone = torch.cat([layer(x[:, c : c + 1]) for c in range(3)], dim=1)
    torch.testing.assert_close(layer(x), alone, rtol=0, atol=1e-6)


def test_filters_are_not_part_of_the_state():
    assert list(FIRDown(TAPS).state_dict()) == []
    assert list(convolution(2, 3).state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [FIRDown, FIRUp])
def test_output_has_the_inputs_precision_whatever_the_filters(make: type, dtype: torch.dtype):
    """The weights of (1, 3, 3, 1) are exact in any of them."""
    x = noise(2, 3, 4, 6, seed=6, dtype=dtype)
    assert make(TAPS)(x).dtype == dtype
    assert torch.equal(make(TAPS)(x), make(TAPS).to(dtype)(x))
