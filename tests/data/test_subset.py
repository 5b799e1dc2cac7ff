"""Which images of a data set are used: settings that are checked, and the paper's draw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.data import Subset
from cmap_defense.errors import SettingsError


def test_the_papers_subset_is_numpys_draw() -> None:
    drawn = Subset(count=500, order="random").indices(10_000)
    assert drawn == np.random.RandomState(0).choice(10_000, 500, replace=False).tolist()
    assert len(set(drawn)) == 500
    assert drawn != sorted(drawn)
    other = Subset(count=500, order="random", seed=3).indices(10_000)
    assert other == np.random.RandomState(3).choice(10_000, 500, replace=False).tolist()


@given(total=st.integers(1, 200), data=st.data())
def test_a_subset_has_as_many_different_images_as_are_wanted(total: int, data: st.DataObject) -> None:
    count = data.draw(st.none() | st.integers(1, total))
    order = data.draw(st.sampled_from(["first", "last", "random"]))
    drawn = Subset(count=count, order=order).indices(total)
    assert all(type(position) is int and 0 <= position < total for position in drawn)
    assert len(drawn) == len(set(drawn)) == (total if count is None else count)
    if order == "first":
        assert drawn == list(range(len(drawn)))
    if order == "last":
        assert drawn == list(range(total))[-len(drawn) :]


def test_a_subset_of_too_few_images_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"5 images are to be used, but the data set has 4\. Take 4 at most: "):
        Subset(count=5).indices(4)
    with pytest.raises(SettingsError, match="the data set has 0"):
        Subset().indices(0)


def test_a_seed_that_numpy_does_not_take_is_refused() -> None:
    with pytest.raises(SettingsError):
        Subset(count=2, order="random", seed=2**32).indices(4)


@given(
    subset=st.builds(Subset, count=st.none() | st.integers(1, 99), order=st.sampled_from(["first", "last", "random"]))
)
def test_json_gives_an_equal_subset_back(subset: Subset) -> None:
    assert Subset.from_json(subset.to_json()) == subset
