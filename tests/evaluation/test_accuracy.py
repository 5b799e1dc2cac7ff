"""Accuracies and Wilson intervals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.errors import CmapError
from cmap_defense.evaluation import Accuracy, wilson_interval


def test_known_values() -> None:
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4901624715, abs=1e-9)
    assert high == pytest.approx(0.9433178485, abs=1e-9)
    low, high = wilson_interval(0, 10)
    assert low == 0
    assert high == pytest.approx(0.2775327998, abs=1e-9)


@given(total=st.integers(1, 2000), data=st.data())
def test_the_interval_holds_the_share_and_solves_wilsons_equation(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    share = correct / total
    assert 0 <= low <= share <= high <= 1
    for bound, at_end in ((low, correct == 0), (high, correct == total)):
        if not at_end:
            error = 1.959963984540054 * math.sqrt(bound * (1 - bound) / total)
            assert abs(share - bound) == pytest.approx(error, abs=1e-9)


def test_no_images_say_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert math.isnan(Accuracy(0, 0).value)


def test_counting() -> None:
    accuracy = Accuracy.of(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 2, 3, 4]))
    assert (accuracy.correct, accuracy.total, accuracy.value) == (3, 4, 0.75)
    assert str(accuracy) == "0.750 [0.301, 0.954]"


def test_bad_arguments() -> None:
    with pytest.raises(CmapError):
        wilson_interval(3, 2)
    with pytest.raises(CmapError):
        Accuracy.of(torch.zeros(3), torch.zeros(2))


@given(shares=st.lists(st.integers(0, 20), min_size=1, max_size=40), seed=st.integers(0, 2**32))
def test_equal_shares_in_any_order_have_the_same_accuracy(shares: list[int], seed: int) -> None:
    """To the last digit: 0.5125 would be shown as 0.512 in one place and as 0.513 in another."""
    values = torch.tensor(shares).double() / 20
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    found = Accuracy.mean(values)
    assert found == Accuracy.mean(shuffled)
    assert found.correct == pytest.approx(sum(shares) / 20, abs=1e-9)
