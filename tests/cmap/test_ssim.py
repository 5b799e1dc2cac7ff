"""SSIMReference is pytorch-msssim on zero-padded images, summed over C x H x W."""

import pytest
import pytorch_msssim
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.cmap.ssim import SSIMReference
from toys import uniform

SEEDS = st.integers(0, 2**31)
SHAPES = st.tuples(st.integers(2, 3), st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))


def padded_ssim(a: Tensor, b: Tensor) -> Tensor:
    """[B] per-image mean of pytorch-msssim's map on images zero-padded by 5."""
    a, b = (F.pad(images, (5, 5, 5, 5)) for images in (a, b))
    return pytorch_msssim.ssim(a, b, data_range=1.0, size_average=False)


def pair(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two batches in [0, 1], half alike, so that SSIM is neither 0 nor 1."""
    a = uniform(*shape, seed=seed, dtype=dtype)
    return a, (a + uniform(*shape, seed=seed + 1, dtype=dtype)) / 2


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=SEEDS)
def test_mean_is_pytorch_msssim_on_padded_images(shape: tuple[int, ...], seed: int):
    a, b = pair(shape, seed)
    ours = SSIMReference.of(b).ssim_sum(a) / a[0].numel()
    torch.testing.assert_close(ours, padded_ssim(a, b), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(shape=SHAPES, seed=SEEDS)
def test_float32_sum_is_pytorch_msssim_within_rounding(shape: tuple[int, ...], seed: int):
    a, b = pair(shape, seed, torch.float32)
    ours = SSIMReference.of(b).ssim_sum(a) / a[0].numel()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), padded_ssim(a.double(), b.double()), rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(shape=SHAPES, seed=SEEDS)
def test_identical_images_give_the_number_of_elements(shape: tuple[int, ...], seed: int):
    images = uniform(*shape, seed=seed, dtype=torch.float64)
    expected = torch.full((shape[0],), float(images[0].numel()), dtype=torch.float64)
    torch.testing.assert_close(SSIMReference.of(images).ssim_sum(images), expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=20)
@given(shape=SHAPES, seed=SEEDS)
def test_gradient_is_that_of_pytorch_msssim(shape: tuple[int, ...], seed: int):
    a, b = pair(shape, seed)
    a.requires_grad_()
    (ours,) = torch.autograd.grad(SSIMReference.of(b).ssim_sum(a).sum(), a)
    (theirs,) = torch.autograd.grad((padded_ssim(a, b) * a[0].numel()).sum(), a)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(shape=SHAPES, seed=SEEDS)
def test_ssim_is_symmetric(shape: tuple[int, ...], seed: int):
    a, b = pair(shape, seed)
    torch.testing.assert_close(SSIMReference.of(a).ssim_sum(b), SSIMReference.of(b).ssim_sum(a), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("index", [[0, 0, 1], [2], [1, 2, 0, 1]])
def test_take_is_the_reference_of_the_taken_images(index: list[int]):
    images, others = uniform(3, 2, 7, 4, seed=1), uniform(len(index), 2, 7, 4, seed=2)
    taken = SSIMReference.of(images).take(torch.tensor(index))
    assert torch.equal(taken.images, images[index])
    torch.testing.assert_close(taken.ssim_sum(others), SSIMReference.of(images[index]).ssim_sum(others))
