"""The scalings around a network, the boundary condition, and the one-step generator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.backbones.base import Backbone, check_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, NoiseRange, boundary_scalings
from toys import noise

SEEDS = st.integers(0, 2**31)
SHAPE = (2, 5, 4)
SIGMA_DATA = st.floats(0.05, 5)


@st.composite
def noise_ranges(draw: st.DrawFn) -> NoiseRange:
    low = draw(st.floats(1e-4, 1))
    return NoiseRange(sigma_min=low, sigma_max=low * draw(st.floats(2, 1e4)), sigma_data=draw(SIGMA_DATA))


class Net(nn.Module):
    """A network that depends on its input, on the noise level, and on each image alone; far from zero."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * noise(SHAPE[0], SHAPE[0], 3, 3, seed=1))
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        self.inputs.append((x.detach(), noise_level.detach()))
        return torch.sin(nn.functional.conv2d(x, self.weight, padding=1)) + noise_level[:, None, None, None]


class SaysDenoiser(ConsistencyBackbone):
    """Is given to purifiers of several steps all the same."""

    kind = "denoiser"


@settings(deadline=None, max_examples=50)
@given(levels=noise_ranges(), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_f_at_sigma_min_is_the_identity_exactly(levels: NoiseRange, seed: int, dtype: torch.dtype):
    backbone = ConsistencyBackbone(Net().to(dtype), SHAPE, levels)
    noisy = noise(3, *SHAPE, seed=seed, dtype=dtype)
    assert torch.equal(backbone.denoise(noisy, levels.sigma_min), noisy)
    assert torch.equal(backbone.denoise(noisy, torch.full((3,), levels.sigma_min, dtype=dtype)), noisy)
    assert torch.equal(SaysDenoiser(Net().to(dtype), SHAPE, levels).denoise(noisy, levels.sigma_min), noisy)


@settings(deadline=None, max_examples=50)
@given(sigma=st.floats(1e-3, 200), sigma_min=st.floats(0, 1e-3), sigma_data=SIGMA_DATA)
def test_scalings_are_those_of_the_papers(sigma: float, sigma_min: float, sigma_data: float):
    c_skip, c_out, c_in = boundary_scalings(
        torch.tensor(sigma, dtype=torch.float64), sigma_data=sigma_data, sigma_min=sigma_min
    )
    assert c_skip.item() == pytest.approx(sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2), rel=1e-12)
    expected = sigma_data * (sigma - sigma_min) / math.sqrt(sigma**2 + sigma_data**2)
    assert c_out.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert c_in.item() == pytest.approx(1 / math.sqrt(sigma**2 + sigma_data**2), rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(sigma=st.floats(1e-3, 200), sigma_data=SIGMA_DATA)
def test_without_sigma_min_the_scalings_are_those_of_the_edm_denoiser(sigma: float, sigma_data: float):
    """They give the network a target (y - c_skip (y + n)) / c_out of unit variance (arXiv 2206.00364, app. B.6)."""
    c_skip, c_out, _ = (
        c.item()
        for c in boundary_scalings(torch.tensor(sigma, dtype=torch.float64), sigma_data=sigma_data, sigma_min=0.0)
    )
    variance = (1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2
    assert variance / c_out**2 == pytest.approx(1, rel=1e-9)


def test_network_sees_the_scaled_input_and_a_quarter_of_the_log_of_sigma():
    net = Net()
    backbone = ConsistencyBackbone(net, SHAPE, NoiseRange(sigma_data=0.7))
    noisy, sigma = noise(3, *SHAPE, seed=2), torch.tensor([0.01, 1.0, 80.0])
    backbone.denoise(noisy, sigma)
    ((x, level),) = net.inputs
    torch.testing.assert_close(x, noisy / (sigma**2 + 0.49).sqrt()[:, None, None, None])
    torch.testing.assert_close(level, sigma.log() / 4)


def test_denoise_is_the_formula():
    net = Net()
    backbone = ConsistencyBackbone(net.double(), SHAPE, NoiseRange(sigma_min=0.1, sigma_max=9.0, sigma_data=0.6))
    noisy, sigma = noise(2, *SHAPE, seed=3, dtype=torch.float64), torch.tensor([0.3, 7.0], dtype=torch.float64)
    s = sigma[:, None, None, None]
    raw = net(noisy / (s**2 + 0.36).sqrt(), sigma.log() / 4)
    expected = 0.36 / ((s - 0.1) ** 2 + 0.36) * noisy + 0.6 * (s - 0.1) / (s**2 + 0.36).sqrt() * raw
    torch.testing.assert_close(backbone.denoise(noisy, sigma), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(levels=noise_ranges(), seed=SEEDS)
def test_generate_is_f_at_sigma_max_clipped(levels: NoiseRange, seed: int):
    backbone = ConsistencyBackbone(Net(), SHAPE, levels)
    latents = noise(3, *SHAPE, seed=seed)
    images = backbone.generate(latents)
    assert images.min().item() >= -1
    assert images.max().item() <= 1
    expected = backbone.denoise(levels.sigma_max * latents, levels.sigma_max).clamp(-1, 1)
    assert torch.equal(images, expected)


def test_no_gradient_flows_where_the_clip_acts():
    """With F(x) = 2 x, f is a multiple of the latent, element by element: the clip shows in the gradient."""

    class Pass(nn.Module):
        def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
            return 2 * x

    backbone = ConsistencyBackbone(Pass(), SHAPE)
    latents = noise(3, *SHAPE, seed=4).requires_grad_()
    raw = backbone.denoise(backbone.noise.sigma_max * latents, backbone.noise.sigma_max)
    images = backbone.generate(latents)
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    clipped = raw.detach().abs() > 1
    assert 0 < clipped.sum().item() < clipped.numel()
    assert torch.equal(images.detach()[clipped], raw.detach()[clipped].sign())
    assert (gradient[clipped] == 0).all()
    assert (gradient[~clipped] != 0).all()


@settings(deadline=None, max_examples=30)
@given(levels=noise_ranges(), seed=SEEDS, batch=st.integers(2, 4))
def test_images_of_a_batch_are_generated_as_if_each_were_alone(levels: NoiseRange, seed: int, batch: int):
    backbone = ConsistencyBackbone(Net().double(), SHAPE, levels)
    latents = noise(batch, *SHAPE, seed=seed, dtype=torch.float64)
    alone = torch.cat([backbone.generate(latents[b : b + 1]) for b in range(batch)])
    torch.testing.assert_close(backbone.generate(latents), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("network_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_have_the_inputs_precision_and_float32_at_least(dtype: torch.dtype, network_dtype: torch.dtype):
    net = Net().to(network_dtype)
    backbone = ConsistencyBackbone(net, SHAPE)
    images = backbone.generate(noise(2, *SHAPE, seed=6, dtype=dtype))
    assert images.dtype == torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x, _ in net.inputs} == {network_dtype}


def test_backbone_satisfies_the_protocol():
    backbone = ConsistencyBackbone(Net(), SHAPE)
    assert isinstance(backbone, Backbone)
    assert check_backbone(backbone) is backbone
    assert backbone.image_shape == SHAPE


@settings(deadline=None, max_examples=30)
@given(levels=noise_ranges())
def test_noise_range_json_round_trip_is_exact(levels: NoiseRange):
    assert NoiseRange.from_json(levels.to_json()) == levels
