"""Selecting from data sets."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.data import ImageSource, LabelledImages
from cmap_defense.errors import DataError
from toys import uniform

TOTAL = 5
DATA = LabelledImages(
    (uniform(TOTAL, 3, 7, 6, seed=1) * 255).to(torch.uint8), torch.tensor([3, 1, 4, 1, 0]), ("a", "b", "c", "d", "e")
)


def same(one: LabelledImages, other: LabelledImages) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and one.class_names == other.class_names
    )


def test_images_in_memory_are_a_source() -> None:
    source: ImageSource = DATA
    assert isinstance(source, ImageSource)
    assert not isinstance(DATA.images, ImageSource)


@given(first=st.lists(st.integers(0, TOTAL - 1)), data=st.data())
def test_a_selection_of_a_selection_is_the_selection_of_its_indices(first: list[int], data: st.DataObject) -> None:
    second = data.draw(st.lists(st.integers(0, len(first) - 1)) if first else st.just([]))
    assert same(DATA.select(first).select(second), DATA.select([first[i] for i in second]))


@pytest.mark.parametrize("indices", [[4, 0, 4], (4, 0, 4), np.array([4, 0, 4]), torch.tensor([4, 0, 4])])
def test_indices_come_as_any_sequence_of_integers(indices: Any) -> None:
    chosen = DATA.select(indices)
    assert torch.equal(chosen.images, torch.stack([DATA.images[4], DATA.images[0], DATA.images[4]]))
    assert chosen.labels.tolist() == [0, 3, 0]
    assert chosen.class_names == DATA.class_names
    chosen.images.zero_()
    assert DATA.images.any(), "a selection is a copy"


@pytest.mark.parametrize("index", [-1, TOTAL, 2**70])
def test_an_index_out_of_range_is_named_with_the_range(index: int) -> None:
    with pytest.raises(DataError, match=f"no image {index}: they go from 0 to 4"):
        DATA.select([0, index])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 1], dtype=torch.int32), "int64"),
        (torch.tensor([True, False, True, False, True]), "int64"),
        (torch.tensor(3), "int64"),
        (torch.tensor([[0, 1], [2, 3]]), "int64"),
        ([0, 1.0], "1.0"),
        ([0, True], "True"),
        ("01", "'0'"),
        (3, "sequence"),
    ],
)
def test_indices_of_other_kinds_are_refused(indices: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DATA.select(indices)
