"""The deep kernel: what it computes, and that its training does what it is for."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import SHAPE, labelled, wrapped
from cmap_defense.detection import EPS, DeepKernelSettings, Gaussian, deep_kernel, mmd_ratio, train_deep_kernel
from cmap_defense.errors import InputValueError
from toys import noise

QUICK = DeepKernelSettings(width=4, features=6, steps=3, batch_size=8)
LONGER = QUICK.replace(steps=60, batch_size=24, learning_rate=5e-3)


def patterned(count: int, seed: int, size: float = 0.0) -> Tensor:
    """Noise, with a checkerboard of either sign in it: the same mean, another look."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 3)
    signs = torch.where(noise(count, 1, 1, 1, seed=seed + 100) < 0, -1.0, 1.0)
    return noise(count, *SHAPE, seed=seed) + size * signs * board


def test_the_kernel_is_that_of_equation_1() -> None:
    clean = patterned(10, 1)
    kernel = train_deep_kernel(clean, patterned(9, 2, 1.0), QUICK)
    first, second = clean[:3], patterned(4, 3)
    values: dict[str, Any] = kernel.to_dict()
    features = torch.cdist(kernel.phi(first).double(), kernel.phi(second).double()) ** 2
    plain = torch.cdist(first.flatten(1).double(), second.flatten(1).double()) ** 2 / values["scale"] ** 2
    kappa = torch.exp(-features / (2 * values["feature_bandwidth"] ** 2))
    q = torch.exp(-plain / (2 * values["sample_bandwidth"] ** 2))
    e = values["mixing"]
    torch.testing.assert_close(kernel(first, second), ((1 - e) * kappa + e) * q, rtol=1e-4, atol=1e-6)
    assert kernel(first, second).dtype == torch.float64
    assert not kernel(first, second).requires_grad


@given(count=st.integers(2, 6), seed=st.integers(0, 20))
def test_the_kernel_is_symmetric_positive_and_1_on_the_diagonal(count: int, seed: int) -> None:
    kernel, own = train_deep_kernel(patterned(4, 1), patterned(4, 2), QUICK.replace(steps=0)), patterned(count, seed)
    values = kernel(own, own)
    torch.testing.assert_close(values, values.T)
    torch.testing.assert_close(values.diagonal(), torch.ones(count, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert torch.linalg.eigvalsh(values).min() > -1e-5


@given(count=st.integers(2, 5), seed=st.integers(0, 20))
def test_the_ratio_is_that_of_equations_3_to_5(count: int, seed: int) -> None:
    """Written element by element."""
    x, y, kernel = noise(count, 2, 3, seed=seed), noise(count, 2, 3, seed=seed + 50) + 1, Gaussian(bandwidth=2.0)

    def k(a: Tensor, b: Tensor) -> float:
        return math.exp(-(a - b).double().square().sum().item() / 8)

    h = [[k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j]) for j in range(count)] for i in range(count)]
    mmd2 = sum(h[i][j] for i in range(count) for j in range(count) if i != j) / (count * (count - 1))
    rows = [sum(row) for row in h]
    variance = 4 / count**3 * sum(row**2 for row in rows) - 4 / count**4 * sum(rows) ** 2
    expected = mmd2 / math.sqrt(max(variance, 0.0) + 0.01)
    assert mmd_ratio(kernel, x, y, 0.01).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert mmd_ratio(kernel, y, x, 0.01).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert mmd_ratio(kernel, x, x, 0.01).item() == pytest.approx(0, abs=1e-9)


def test_training_raises_the_ratio_on_samples_that_it_has_not_seen() -> None:
    """The checkerboard is one direction of 144, in which a Gaussian kernel on the samples sees little."""
    clean, attacked = patterned(64, 1), patterned(64, 2, 0.8)
    before = train_deep_kernel(clean, attacked, LONGER.replace(steps=0))
    after = train_deep_kernel(clean, attacked, LONGER)
    held_out = patterned(64, 3), patterned(64, 4, 0.8)
    assert len(after.ratios) == 60
    assert sum(after.ratios[-10:]) > sum(after.ratios[:10]) + 5
    assert mmd_ratio(after, *held_out) > mmd_ratio(before, *held_out) + 0.5


def test_training_is_a_function_of_samples_and_settings() -> None:
    clean, attacked = patterned(9, 1), patterned(12, 2, 1.0)
    state = torch.random.get_rng_state()
    first = train_deep_kernel(clean, attacked, QUICK)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    with torch.inference_mode():
        again = train_deep_kernel(clean.clone(), attacked.clone(), QUICK)
    assert again.ratios == first.ratios
    other = train_deep_kernel(clean, attacked, QUICK.replace(seed=1))
    assert other.ratios != first.ratios
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_papers_kernel_is_trained_on_scores_of_fgsm_samples() -> None:
    images, labels = labelled(5)
    model, eps = wrapped().eval(), EPS(sigmas=(0.1, 0.3))
    kernel = deep_kernel(model, images, labels, eps=eps, settings=QUICK)
    again = deep_kernel(model, images, labels, eps=eps, settings=QUICK, max_parallel=2)
    assert kernel.ratios == pytest.approx(again.ratios, rel=1e-3, abs=1e-4)
    assert len(kernel.ratios) == 3


def test_samples_that_do_not_fit() -> None:
    with pytest.raises(InputValueError, match="two samples"):
        train_deep_kernel(patterned(4, 1), patterned(4, 1).mT, QUICK)
    with pytest.raises(InputValueError, match="two samples"):
        train_deep_kernel(patterned(4, 1), patterned(1, 1), QUICK)
    with pytest.raises(InputValueError, match="not all 0"):
        train_deep_kernel(0 * patterned(4, 1), patterned(4, 1), QUICK)
    with pytest.raises(InputValueError, match="are the same"):
        train_deep_kernel(torch.ones(4, *SHAPE), patterned(4, 1), QUICK)
    with pytest.raises(InputValueError, match="one size"):
        mmd_ratio(Gaussian(bandwidth=1.0), patterned(4, 1), patterned(3, 1))
