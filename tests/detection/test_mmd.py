"""Laws of the maximum mean discrepancy, and of the area under the curve."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.detection import Gaussian, mmd_distances, squared_distances, unbiased_mmd2
from cmap_defense.errors import InputTypeError, InputValueError, SettingsError
from toys import noise

WIDE = Gaussian(bandwidth=1.5)
counts = st.integers(2, 6)


def samples(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return shift + noise(count, 2, 3, seed=seed)


def population_mmd2(first: Tensor, second: Tensor) -> float:
    """Of two populations that are these points: all pairs, equal ones too."""
    parts = [WIDE(a, b).mean().item() for a, b in ((first, first), (second, second), (first, second))]
    return parts[0] + parts[1] - 2 * parts[2]


def test_distances_are_those_of_cdist_and_do_not_suffer_from_an_offset() -> None:
    x, y = samples(4, 1).double(), samples(5, 2).double()
    expected = torch.cdist(x.flatten(1), y.flatten(1)) ** 2
    torch.testing.assert_close(squared_distances(x, y), expected)
    torch.testing.assert_close(squared_distances(x + 1e6, y + 1e6), expected, rtol=1e-7, atol=1e-7)


def test_the_median_heuristic() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0]])
    assert Gaussian.median(points).bandwidth == pytest.approx(2.0)
    assert WIDE(points[:1], points[1:]).tolist()[0] == pytest.approx([math.exp(-1 / 4.5), math.exp(-9 / 4.5)])
    assert WIDE(points, points).dtype == torch.float64
    assert Gaussian.from_json(WIDE.to_json()) == WIDE


@given(m=counts, n=counts, shift=st.floats(-2, 2))
def test_two_samples_are_as_far_from_each_other_either_way_and_in_any_order(m: int, n: int, shift: float) -> None:
    first, second = samples(m, 1), samples(n, 2, shift)
    found = unbiased_mmd2(WIDE, first, second)
    torch.testing.assert_close(unbiased_mmd2(WIDE, second, first), found)
    torch.testing.assert_close(unbiased_mmd2(WIDE, first.flip(0), second.roll(1, 0)), found)


@settings(max_examples=8)
@given(shift=st.floats(-2, 2), seed=st.integers(0, 50))
def test_the_mean_over_all_samples_is_that_of_the_populations_which_is_not_negative(shift: float, seed: int) -> None:
    first, second = samples(3, seed, shift), samples(2, seed + 1)
    draws = itertools.product(itertools.product(range(3), repeat=2), itertools.product(range(2), repeat=3))
    found = [unbiased_mmd2(WIDE, first[list(a)], second[list(b)]).item() for a, b in draws]
    expected = population_mmd2(first, second)
    assert sum(found) / len(found) == pytest.approx(expected, abs=1e-12)
    assert expected >= -1e-15


@given(count=st.integers(0, 5), n=st.integers(1, 6), shift=st.floats(-3, 3), chunk=st.integers(1, 6))
def test_distances_of_single_samples(count: int, n: int, shift: float, chunk: int) -> None:
    """Not negative, the formula, and no dependence on the order of the references, the batch or the chunks."""
    own, references = samples(count, 1, shift), samples(n, 2)
    found = mmd_distances(WIDE, own, references)
    assert found.dtype == torch.float64
    assert found.shape == (count,)
    assert (found >= 0).all()
    expected = [population_mmd2(own[i : i + 1], references) for i in range(count)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mmd_distances(WIDE, own, references.flip(0), chunk=chunk), found)
    torch.testing.assert_close(mmd_distances(WIDE, own.flip(0), references), found.flip(0))


def test_a_sample_is_at_distance_0_from_itself_and_grows_with_the_shift() -> None:
    own, references = samples(1, 1), samples(4, 2)
    assert mmd_distances(WIDE, own, own.expand(3, -1, -1)).item() == pytest.approx(0, abs=1e-12)
    far = [mmd_distances(WIDE, references[:1] + shift, references).item() for shift in (0, 2, 4)]
    assert far[0] < far[1] < far[2]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (samples(1, 1), samples(3, 2), "first must be 2"),
        (samples(3, 1), samples(1, 2), "second must be 2"),
        (samples(3, 1), samples(3, 2).mT, "one shape"),
        (samples(3, 1) * math.inf, samples(3, 2), "first must be finite"),
    ],
)
def test_samples_that_do_not_fit(first: Tensor, second: Tensor, words: str) -> None:
    with pytest.raises(InputValueError, match=words):
        unbiased_mmd2(WIDE, first, second)


def test_mistakes() -> None:
    with pytest.raises(SettingsError, match="bandwidth"):
        Gaussian(bandwidth=0.0)
    with pytest.raises(InputValueError, match=r"Gaussian\(bandwidth"):
        Gaussian.median(torch.ones(3, 2))
    with pytest.raises(InputValueError, match="references must be 2"):
        Gaussian.median(torch.ones(1, 2))
    with pytest.raises(InputTypeError, match="floating-point"):
        Gaussian.median(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(InputValueError, match="references must be 1"):
        mmd_distances(WIDE, samples(2, 1), samples(0, 1))
    with pytest.raises(SettingsError, match="chunk"):
        mmd_distances(WIDE, samples(2, 1), samples(2, 1), chunk=0)
