"""Accuracies, Wilson intervals, and areas under the ROC curve."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor

from cmap_defense.common.statistics import AUROC, Accuracy, student_quantile, wilson_interval
from cmap_defense.errors import CmapError, InputValueError


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


def test_json_and_back() -> None:
    for accuracy in (Accuracy(3, 4), Accuracy(2.5, 7), Accuracy(0, 0)):
        values = accuracy.to_dict()
        assert Accuracy.from_dict(values) == accuracy
        assert values["interval"] == list(accuracy.interval)
    assert Accuracy(0, 0).to_dict()["value"] is None
    assert str(Accuracy(0, 0)) == "no images"


@given(p=st.floats(0.9, 0.999), degrees=st.integers(1, 200))
def test_student_s_quantile(p: float, degrees: int) -> None:
    assert student_quantile(p, degrees) == pytest.approx(student.ppf(p, degrees), rel=0.01)


def test_the_area_compares_in_the_finer_precision() -> None:
    assert AUROC.of(torch.tensor([1 + 1e-12], dtype=torch.float64), torch.tensor([1.0])).value == 1


values = st.lists(st.integers(-3, 3), min_size=1, max_size=8).map(lambda drawn: torch.tensor(drawn).double())


@given(first=values, second=values)
def test_the_area_counts_pairs(first: Tensor, second: Tensor) -> None:
    found = AUROC.of(first, second)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in first for b in second]
    assert found.value == pytest.approx(sum(pairs) / len(pairs))
    assert AUROC.of(second, first).value == pytest.approx(1 - found.value)
    low, high = found.interval
    assert 0 <= low <= found.value <= high <= 1
    assert high - low > 0.05


@given(value=st.floats(0.02, 0.98), first=st.integers(2, 300), second=st.integers(2, 300))
def test_the_ends_of_the_interval_solve_its_equation(value: float, first: int, second: int) -> None:
    """By Hanley's and McNeil's formula, written with their Q1 and Q2."""
    for end in AUROC(value, first, second).interval:
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
        variance = end * (1 - end) + (first - 1) * (q1 - end**2) + (second - 1) * (q2 - end**2)
        assert abs(value - end) == pytest.approx(1.959963984540054 * math.sqrt(variance / (first * second)), abs=1e-9)


def test_complete_separation_is_not_taken_for_certainty() -> None:
    low, high = AUROC(1.0, 20, 20).interval
    assert 0.8 < low < 0.95
    assert high == 1
    assert AUROC(0.0, 20, 20).interval == pytest.approx((0, 1 - low))
    narrow = AUROC(1.0, 200, 200).interval
    assert low < narrow[0] < 1
    assert str(AUROC(0.5, 50, 50)).startswith("0.500 [0.3")


def test_areas_of_nothing() -> None:
    for first, second in ((torch.ones(0), torch.ones(2)), (torch.ones(2, 1), torch.ones(2))):
        with pytest.raises(InputValueError, match="AUROC"):
            AUROC.of(first, second)
    with pytest.raises(InputValueError, match="finite"):
        AUROC.of(torch.tensor([math.nan, 1.0]), torch.ones(2))
