"""Eq. 9, 10 and 12: their optimum, their symmetries, their values and their gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.cmap.losses import ObjectiveTerms, combine_terms, latent_moments, latent_term, perceptual_terms
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference
from toys import noise, uniform

SEEDS = st.integers(0, 2**31)
LATENT_SHAPES = st.tuples(st.integers(2, 3), st.integers(2, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
WEIGHTS = st.floats(0, 10)


def objective(generated: Tensor, images: Tensor, latents: Tensor, chosen: CMAPSettings) -> ObjectiveTerms:
    """All terms for generated images and latents [B, K, C, H, W] and images [B, C, H, W]."""
    owners = torch.arange(len(images)).repeat_interleave(latents.shape[1])
    l1, ssim = perceptual_terms(generated.flatten(0, 1), SSIMReference.of(images).take(owners))
    shape = latents.shape[:2]
    return combine_terms(l1.view(shape), ssim.view(shape), latent_term(latents), chosen)


def case(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Generated images in (-1, 1), inputs in [0, 1] and latents for ``shape`` = (B, K, C, H, W)."""
    generated = 2 * uniform(*shape, seed=seed, dtype=dtype) - 1
    images = uniform(shape[0], *shape[2:], seed=seed + 1, dtype=dtype)
    return generated, images, noise(*shape, seed=seed + 2, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------- L_d


@settings(deadline=None, max_examples=30)
@given(shape=LATENT_SHAPES, seed=SEEDS)
def test_latent_term_is_zero_where_mean_is_0_and_unbiased_std_is_1(shape: tuple[int, ...], seed: int):
    latents = noise(*shape, seed=seed, dtype=torch.float64)
    latents = latents - latents.mean(dim=1, keepdim=True)
    latents = latents / latents.std(dim=1, keepdim=True, unbiased=True)
    assert latent_term(latents).abs().max().item() < 1e-20


@settings(deadline=None, max_examples=30)
@given(shape=LATENT_SHAPES, seed=SEEDS)
def test_moments_are_the_mean_and_the_unbiased_standard_deviation(shape: tuple[int, ...], seed: int):
    latents = noise(*shape, seed=seed, dtype=torch.float64)
    mean, std = latent_moments(latents)
    torch.testing.assert_close(mean, latents.mean(dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, latents.std(dim=1, unbiased=True), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, batch=st.integers(2, 4))
def test_one_latent_has_the_mean_term_alone(seed: int, batch: int):
    latents = noise(batch, 1, 3, 5, 4, seed=seed, dtype=torch.float64)
    expected = latents.square().flatten(1).sum(dim=1)
    torch.testing.assert_close(latent_term(latents), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n_latents", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 0])
def test_identical_latents_have_a_finite_gradient(n_latents: int, dtype: torch.dtype, size: int):
    latents = (size * noise(2, 1, 3, 5, 4, seed=3, dtype=dtype)).repeat(1, n_latents, 1, 1, 1).requires_grad_()
    value = latent_term(latents)
    (gradient,) = torch.autograd.grad(value.sum(), latents)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("n_latents", [1, 2, 5])
def test_latent_term_gradient_is_its_finite_difference(n_latents: int):
    latents = noise(2, n_latents, 2, 3, 2, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(latent_term, latents)


@pytest.mark.parametrize("n_latents", [1, 3])
def test_latent_term_second_derivative_is_its_finite_difference(n_latents: int):
    latents = noise(2, n_latents, 1, 3, 2, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(latent_term, latents)


# ------------------------------------------------------------------------------------------------------- L_a and L


@settings(deadline=None, max_examples=20)
@given(shape=LATENT_SHAPES, seed=SEEDS, order=st.randoms(use_true_random=False))
def test_objective_does_not_depend_on_the_order_of_the_latents(shape: tuple[int, ...], seed: int, order):
    generated, images, latents = case(shape, seed)
    permutation = order.sample(range(shape[1]), shape[1])
    straight = objective(generated, images, latents, CMAPSettings())
    permuted = objective(generated[:, permutation], images, latents[:, permutation], CMAPSettings())
    torch.testing.assert_close(permuted.total, straight.total, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(permuted.latent, straight.latent, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted.l1, straight.l1[:, permutation], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted.ssim, straight.ssim[:, permutation], rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(shape=LATENT_SHAPES, seed=SEEDS)
def test_perceptual_terms_of_the_image_itself_are_0_and_the_number_of_elements(shape: tuple[int, ...], seed: int):
    _, images, _ = case(shape, seed)
    l1, ssim = perceptual_terms(2 * images - 1, SSIMReference.of(images))
    assert torch.equal(l1, torch.zeros_like(l1))
    torch.testing.assert_close(ssim, torch.full_like(ssim, images[0].numel()), rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    seed=SEEDS,
    ssim_weight=WEIGHTS,
    latent_weight=WEIGHTS,
)
def test_objective_is_the_formula_written_as_loops(
    shape: tuple[int, ...], seed: int, ssim_weight: float, latent_weight: float
):
    generated, images, latents = case(shape, seed)
    chosen = CMAPSettings(ssim_weight=ssim_weight, latent_weight=latent_weight)
    ours = objective(generated, images, latents, chosen)
    for b in range(shape[0]):
        l1, ssim, latent, total = loop_objective(
            generated[b].tolist(), images[b].tolist(), latents[b].tolist(), ssim_weight, latent_weight
        )
        assert ours.l1[b].tolist() == pytest.approx(l1, rel=1e-12, abs=1e-12)
        assert ours.ssim[b].tolist() == pytest.approx(ssim, rel=1e-6, abs=1e-6)  # the window is a float32 one
        assert ours.latent[b].item() == pytest.approx(latent, rel=1e-12, abs=1e-12)
        expected = sum(a - ssim_weight * s for a, s in zip(l1, ours.ssim[b].tolist(), strict=True)) / shape[1]
        assert ours.total[b].item() == pytest.approx(expected + latent_weight * latent, rel=1e-12, abs=1e-10)
        assert ours.total[b].item() == pytest.approx(total, rel=1e-5, abs=1e-5)


def test_perceptual_gradients_are_finite_differences():
    """At points where every |G - x'| exceeds 0.05, away from the kink of the absolute value."""
    images = uniform(2, 2, 4, 3, seed=7, dtype=torch.float64)
    difference = 0.05 + 0.3 * uniform(2, 2, 4, 3, seed=8, dtype=torch.float64)
    sign = torch.where(images < 0.5, 1.0, -1.0).double()
    generated = (2 * images - 1 + sign * difference).requires_grad_()
    reference = SSIMReference.of(images)
    assert torch.autograd.gradcheck(lambda g: perceptual_terms(g, reference), generated)


def test_l1_gradient_is_the_sign_of_the_difference():
    generated, images, _ = case((2, 1, 2, 4, 3), 9)
    generated = generated[:, 0].requires_grad_()
    l1, _ = perceptual_terms(generated, SSIMReference.of(images))
    (gradient,) = torch.autograd.grad(l1.sum(), generated)
    assert torch.equal(gradient, torch.sign(generated.detach() - (2 * images - 1)))


def loop_objective(
    generated: list, image: list, latents: list, ssim_weight: float, latent_weight: float
) -> tuple[list[float], list[float], float, float]:
    """l1 and ssim per latent, L_d and L of one image, element by element, from nested lists [K][C][H][W]."""
    n_latents, channels, height, width = len(latents), len(image), len(image[0]), len(image[0][0])
    positions = [(c, y, x) for c in range(channels) for y in range(height) for x in range(width)]
    l1s, ssims = [], []
    for picture in generated:
        l1s.append(sum(abs(picture[c][y][x] - (2 * image[c][y][x] - 1)) for c, y, x in positions))
        unit = [[[(v + 1) / 2 for v in row] for row in plane] for plane in picture]
        ssims.append(sum(loop_ssim(unit[c], image[c], y, x) for c, y, x in positions))
    latent = 0.0
    for c, y, x in positions:
        values = [latents[k][c][y][x] for k in range(n_latents)]
        mean = sum(values) / n_latents
        latent += mean**2
        if n_latents > 1:
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n_latents - 1))
            latent += (std - 1) ** 2
    perceptual = sum(a - ssim_weight * s for a, s in zip(l1s, ssims, strict=True)) / n_latents
    return l1s, ssims, latent, perceptual + latent_weight * latent


def loop_ssim(a: list, b: list, y: int, x: int) -> float:
    """SSIM of two planes [H][W] at one pixel: 11 x 11 Gaussian window, sigma 1.5, zeros outside."""
    profile = [math.exp(-(d**2) / (2 * 1.5**2)) for d in range(-5, 6)]
    total = sum(profile) ** 2
    mean_a = mean_b = square_a = square_b = product = 0.0
    for dy in range(-5, 6):
        for dx in range(-5, 6):
            if 0 <= y + dy < len(a) and 0 <= x + dx < len(a[0]):
                weight = profile[dy + 5] * profile[dx + 5] / total
                va, vb = a[y + dy][x + dx], b[y + dy][x + dx]
                mean_a += weight * va
                mean_b += weight * vb
                square_a += weight * va * va
                square_b += weight * vb * vb
                product += weight * va * vb
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    covariance = 2 * (product - mean_a * mean_b) + 0.03**2
    return luminance * covariance / (square_a - mean_a**2 + square_b - mean_b**2 + 0.03**2)


@settings(deadline=None, max_examples=30)
@given(shape=LATENT_SHAPES, seed=SEEDS, tolerance=st.floats(0.01, 2.5), smoothing=st.sampled_from([0.0, 0.1]))
def test_differences_within_the_tolerance_cost_nothing_in_l1(
    shape: tuple[int, ...], seed: int, tolerance: float, smoothing: float
):
    generated, images, _ = case((shape[0], 1, *shape[2:]), seed)
    generated, reference = generated.flatten(0, 1), SSIMReference.of(images)
    l1, ssim = perceptual_terms(generated.requires_grad_(), reference, smoothing, tolerance)
    far = (generated - (2 * images - 1)).abs() > tolerance
    (slope,) = torch.autograd.grad(l1.sum(), generated)
    assert torch.equal(slope != 0, far)
    plain, same = perceptual_terms(generated, reference, smoothing)
    assert torch.equal(ssim, same)
    assert ((plain - tolerance * math.prod(shape[2:]) <= l1 + 1e-9) & (l1 <= plain)).all()
    if not smoothing:
        expected = ((generated - (2 * images - 1)).abs() - tolerance)[far].sum()
        torch.testing.assert_close(l1.sum(), expected, rtol=1e-9, atol=1e-9)
