"""The statistics behind a certificate."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmap_defense.certification import certified_radii, lower_bounds
from cmap_defense.certification.bounds import differing
from cmap_defense.errors import MissingExtraError

ALPHAS = st.floats(0.001, 0.5)


@given(st.integers(1, 200), ALPHAS, st.floats(0.01, 0.99))
def test_a_bound_is_too_high_with_probability_alpha_at_most(n: int, alpha: float, probability: float) -> None:
    counts = torch.arange(n + 1)
    wrong = lower_bounds(counts, n, alpha) > probability
    chance = torch.from_numpy(stats.binom.pmf(counts.numpy(), n, probability))
    assert chance[wrong].sum() <= alpha + 1e-9


@given(st.integers(1, 1000), ALPHAS, st.data())
def test_bounds_are_those_of_clopper_and_pearson(n: int, alpha: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    interval = stats.binomtest(count, n, alternative="greater").proportion_ci(1 - alpha, method="exact")
    bound = lower_bounds(torch.tensor([count, n]), n, alpha)
    assert bound[0].item() == pytest.approx(interval.low, abs=1e-9)
    assert bound[1].item() == pytest.approx(alpha ** (1 / n))


@pytest.mark.parametrize(("n", "radius"), [(100, 1.50), (1000, 2.46), (10_000, 3.20), (100_000, 3.81)])
def test_the_largest_radii_are_the_published_ones(n: int, radius: float) -> None:
    found = certified_radii(lower_bounds(torch.tensor([n, n // 2]), n, 0.001), sigma=0.5)
    assert found.tolist() == pytest.approx([radius / 2, 0.0], abs=0.005)


@given(st.floats(0.0, 1 - 1e-12), st.floats(0.01, 10))
def test_a_radius_is_sigma_times_the_normal_quantile(bound: float, sigma: float) -> None:
    wanted = sigma * stats.norm.ppf(bound) if bound > 0.5 else 0.0
    assert certified_radii(torch.tensor([bound], dtype=torch.float64), sigma).item() == pytest.approx(wanted, abs=1e-9)


def test_two_classes_differ_where_the_binomial_test_says_so() -> None:
    counts = torch.tensor([[0, 10, 0], [6, 0, 4], [5, 5, 0], [30, 5, 0], [0, 0, 0]])
    assert differing(counts, 0.01).tolist() == [True, False, False, True, False]  # 2^-9, 0.75, 1, 2e-5
    assert differing(counts[:1], 2 / 1024 - 1e-6).tolist() == [False]
    assert differing(counts[:1], 2 / 1024 + 1e-6).tolist() == [True]


def test_a_probability_of_one_half_has_no_radius() -> None:
    assert certified_radii(torch.tensor([0.0, 0.5, 0.5 + 1e-9]), 1.0).tolist()[:2] == [0.0, 0.0]
    assert math.isinf(certified_radii(torch.tensor([1.0]), 1.0).item())


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtraError, match=r"cmap-defense\[certify\]"):
        lower_bounds(torch.tensor([1, 2]), 3, 0.1)
