"""How often and on which images: settings that are checked, and noise that no two of anything share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.attacks.oracle import REEVALUATION, RESTART
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation import Protocol, Subset
from cmap_defense.evaluation.protocol import answer_seeds, run_indices
from cmap_defense.rng import derived_seeds

RUNS = st.integers(0, 2**22 - 1)
POSITIONS = st.integers(0, 2**40 - 1)


@given(
    answers=st.integers(1, 1000),
    repurifications=st.integers(1, 1000),
    seeds=st.lists(RUNS, min_size=1, max_size=5, unique=True),
    group=st.integers(1, 1000),
    search_control=st.booleans(),
    sanity_images=st.integers(0, 1000),
    gradient_samples=st.integers(1, 500).map(lambda half: 2 * half),
)
def test_json_gives_an_equal_protocol_back(**values: Any) -> None:
    protocol = Protocol(**values)
    assert Protocol.from_json(protocol.to_json()) == protocol
    assert protocol.to_dict() == values
    assert isinstance(protocol.seeds, tuple)
    assert hash(Protocol.from_dict(values)) == hash(protocol)


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert Protocol().to_dict() == {
        "answers": 10,
        "repurifications": 20,
        "seeds": [0],
        "group": 32,
        "search_control": True,
        "sanity_images": 16,
        "gradient_samples": 64,
    }
    assert Subset().to_dict() == {"count": None, "order": "first", "seed": 0}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"answers": 0}, r"answers must be at least 1"),
        ({"answers": 2.0}, r"answers must be an integer"),
        ({"answers": True}, r"answers must be an integer"),
        ({"repurifications": 0}, r"repurifications must be at least 1"),
        ({"group": 0}, r"group must be at least 1"),
        ({"sanity_images": -1}, r"sanity_images must be at least 0"),
        ({"search_control": 1}, r"search_control must be True or False"),
        ({"gradient_samples": 0}, r"gradient_samples must be at least 2"),
        ({"gradient_samples": 7}, r"gradient_samples must be even, but is 7"),
        ({"seeds": ()}, r"seeds must be integers, one for each run"),
        ({"seeds": 0}, r"seeds must be integers, one for each run"),
        ({"seeds": "01"}, r"seeds must be integers, one for each run"),
        ({"seeds": (0, 0.5)}, r"seeds must be an integer"),
        ({"seeds": (-1,)}, r"seeds must be at least 0"),
        ({"seeds": (3, 3)}, r"seeds must differ"),
        ({"seeds": (0, 2**22)}, r"be below 4194304, but are \[0, 4194304\]"),
        ({"runs": 3}, r"no setting 'runs'"),
    ],
)
def test_a_wrong_protocol_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Protocol.from_dict(wrong)


@given(pairs=st.sets(st.tuples(POSITIONS, RUNS), min_size=1, max_size=20))
def test_no_two_images_and_runs_share_a_noise_index(pairs: set[tuple[int, int]]) -> None:
    found = [run_indices(torch.tensor([position]), run).item() for position, run in pairs]
    assert len(set(found)) == len(pairs)
    assert 0 <= min(found) <= max(found) < 2**63


def test_in_run_0_the_noise_indices_are_the_positions() -> None:
    positions = torch.tensor([7, 0, 12345])
    assert torch.equal(run_indices(positions, 0), positions)
    assert run_indices(positions, 2**22 - 1).dtype == torch.int64


def test_no_two_answers_share_their_noise() -> None:
    """Of any images, in any runs; and no attack's search or judgement has it either, whatever seed it was given."""
    indices = torch.cat([run_indices(torch.arange(40), run) for run in (0, 1, 2**22 - 1)])
    answers = torch.stack([answer_seeds(indices, number) for number in range(30)])
    assert answers.unique().numel() == answers.numel() == 30 * 120
    bases = [derived_seeds(indices, seed) for seed in (0, 1, 0xA45)]
    streams = [derived_seeds(base, stream) for base in bases for stream in (REEVALUATION, RESTART, RESTART + 1)]
    heard = torch.stack([derived_seeds(stream, evaluation) for stream in streams for evaluation in range(30)])
    assert not torch.isin(heard, answers).any()


def test_an_answers_noise_hangs_on_image_and_number_alone() -> None:
    indices = torch.tensor([5, 3, 2**40 + 5])
    whole = answer_seeds(indices, 4)
    assert torch.equal(answer_seeds(indices.flip(0), 4), whole.flip(0))
    assert torch.equal(answer_seeds(indices[1:2], 4), whole[1:2])


# --- which images -----------------------------------------------------------------------------------------------------


def test_the_papers_subset_is_numpys_draw() -> None:
    drawn = Subset(count=500, order="random").indices(10_000)
    assert drawn == np.random.RandomState(0).choice(10_000, 500, replace=False).tolist()
    assert len(set(drawn)) == 500
    assert drawn != sorted(drawn)
    other = Subset(count=500, order="random", seed=3).indices(10_000)
    assert other == np.random.RandomState(3).choice(10_000, 500, replace=False).tolist()


@given(total=st.integers(1, 200), data=st.data())
def test_a_subset_has_as_many_different_images_as_were_asked_for(total: int, data: st.DataObject) -> None:
    count = data.draw(st.none() | st.integers(1, total))
    order = data.draw(st.sampled_from(["first", "last", "random"]))
    drawn = Subset(count=count, order=order).indices(total)
    assert all(type(position) is int and 0 <= position < total for position in drawn)
    assert len(drawn) == len(set(drawn)) == (total if count is None else count)
    if order == "first":
        assert drawn == list(range(len(drawn)))
    if order == "last":
        assert drawn == list(range(total))[-len(drawn) :]


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 2.5}, {"order": "least"}, {"seed": -1}, {"seed": True}])
def test_a_wrong_subset_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Subset(**wrong)


def test_a_subset_of_too_few_images_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"5 images are to be evaluated, but the data set has 4\. Take 4 at most: -n 4, "
    ):
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
