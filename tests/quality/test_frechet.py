"""The Frechet distance: closed forms, laws, and another way to compute it."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.errors import InputTypeError, InputValueError
from cmap_defense.quality import frechet_distance, gaussian_distance
from toys import noise

SEEDS = st.integers(0, 2**20)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(size, size, seed=seed, dtype=torch.float64)).Q


def vectors(count: int, size: int, seed: int) -> Tensor:
    """Correlated, with a mean of their own."""
    mix, mean = noise(size, size, seed=seed + 1, dtype=torch.float64), noise(size, seed=seed + 2, dtype=torch.float64)
    return noise(count, size, seed=seed, dtype=torch.float64) @ mix + mean


def exactly(count: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """A set whose own mean and covariance are these."""
    drawn = noise(count, len(mean), seed=seed, dtype=torch.float64)
    drawn = drawn - drawn.mean(dim=0)
    own = torch.linalg.cholesky(drawn.mT @ drawn / (count - 1))
    white = torch.linalg.solve_triangular(own, drawn.mT, upper=False).mT
    return white @ torch.linalg.cholesky(covariance).mT + mean


@given(seed=SEEDS, size=st.integers(1, 5))
def test_covariances_with_the_same_axes_have_a_closed_form(seed: int, size: int) -> None:
    means = noise(2, size, seed=seed, dtype=torch.float64)
    deviations = noise(2, size, seed=seed + 1, dtype=torch.float64).abs() + 0.1
    closed = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    axes = rotation(size, seed)
    for turned in (torch.eye(size, dtype=torch.float64), axes):
        covariances = [turned @ part.square().diag() @ turned.mT for part in deviations]
        found = gaussian_distance(means[0], covariances[0], means[1], covariances[1])
        assert found == pytest.approx(closed.item(), rel=1e-9, abs=1e-9)
        sets = [exactly(size + 3 + i, means[i], covariances[i], seed + i) for i in range(2)]
        assert frechet_distance(*sets) == pytest.approx(closed.item(), rel=1e-7, abs=1e-7)


@given(seed=SEEDS, size=st.integers(1, 6))
def test_it_is_the_plain_formula(seed: int, size: int) -> None:
    first, second = vectors(size + 4, size, seed), vectors(size + 7, size, seed + 9)
    means = [part.mean(dim=0).numpy() for part in (first, second)]
    covariances = [np.cov(part.numpy(), rowvar=False).reshape(size, size) for part in (first, second)]
    apart = np.square(means[0] - means[1]).sum() + np.trace(covariances[0]) + np.trace(covariances[1])
    product = covariances[0] @ covariances[1]
    by_values = apart - 2 * np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    by_root = apart - 2 * np.trace(scipy.linalg.sqrtm(product).real)
    found = frechet_distance(first, second)
    scale = np.trace(covariances[0]) + np.trace(covariances[1])
    assert found == pytest.approx(by_values, abs=1e-6 * scale)
    assert found == pytest.approx(by_root, abs=1e-6 * scale)


@given(seed=SEEDS, size=st.integers(1, 6), shift=st.floats(-100, 100))
def test_laws(seed: int, size: int, shift: float) -> None:
    first, second = vectors(size + 3, size, seed), vectors(size + 6, size, seed + 9)
    found = frechet_distance(first, second)
    near = {"rel": 1e-7, "abs": 1e-7}
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * (1 + first.square().sum().item()))
    assert frechet_distance(first, first.flip(0)) == pytest.approx(0, abs=1e-9 * (1 + first.square().sum().item()))
    assert found >= 0
    assert frechet_distance(second, first) == pytest.approx(found, **near)
    turn = rotation(size, seed + 1)
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(found, **near)
    assert frechet_distance(first + shift, second + shift) == pytest.approx(found, rel=1e-6, abs=1e-6)
    assert frechet_distance(3 * first, 3 * second) == pytest.approx(9 * found, **near)
    moved = first + noise(size, seed=seed + 3, dtype=torch.float64)
    away = (moved - first)[0].square().sum().item()
    assert frechet_distance(first, moved) == pytest.approx(away, **near)


def test_directions_without_spread_cost_no_accuracy() -> None:
    flat = vectors(40, 6, 0) * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
    assert frechet_distance(flat, flat.flip(0)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(flat, flat + 1) == pytest.approx(6, abs=1e-10)


def test_it_works_in_float64_and_leaves_its_arguments() -> None:
    first, second = vectors(9, 3, 0).float() + 1000, vectors(9, 3, 1).float() + 1000
    kept = first.clone()
    assert frechet_distance(first, second) == frechet_distance(first.double(), second.double())
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(9, 4), InputValueError, r"first: 4 vectors of 4 numbers .* at least 5"),
        (torch.zeros(9, 4), torch.zeros(2, 4), InputValueError, r"second: 2 vectors of 4"),
        (torch.zeros(9, 4), torch.zeros(9, 3), InputValueError, "these have 4 and 3"),
        (torch.zeros(9), torch.zeros(9, 3), InputValueError, r"\[N, d\], but is \[9\]"),
        (torch.full((9, 2), torch.nan), torch.zeros(9, 2), InputValueError, "finite"),
        (torch.zeros(9, 2, dtype=torch.int64), torch.zeros(9, 2), InputTypeError, "floating-point"),
        ([[1.0]], torch.zeros(9, 2), InputTypeError, "floating-point"),
    ],
)
def test_bad_sets(first: Tensor, second: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        frechet_distance(first, second)
