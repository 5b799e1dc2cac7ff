"""How often and on which images: settings that are checked, and noise that no two of anything share."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.attacks.oracle import REEVALUATION, RESTART
from cmap_defense.common.rng import derived_seeds
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation import Protocol
from cmap_defense.evaluation.protocol import prediction_seeds, run_indices

RUNS = st.integers(0, 2**22 - 1)
POSITIONS = st.integers(0, 2**40 - 1)


@given(
    predictions=st.integers(1, 1000),
    reevaluations=st.integers(1, 1000),
    seeds=st.lists(RUNS, min_size=1, max_size=5, unique=True),
    group=st.integers(1, 1000),
    search_on_clean=st.booleans(),
    sanity_images=st.integers(0, 1000),
    gradient_samples=st.integers(1, 500).map(lambda half: 2 * half),
)
def test_json_gives_an_equal_protocol_back(**values: Any) -> None:
    protocol = Protocol(**values)
    assert Protocol.from_json(protocol.to_json()) == protocol
    assert protocol.to_dict() == values
    assert isinstance(protocol.seeds, tuple)
    assert hash(Protocol.from_dict(values)) == hash(protocol)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gradient_samples": 7}, r"gradient_samples must be even, but is 7"),
        ({"seeds": ()}, r"seeds must be integers, one for each run"),
        ({"seeds": 0}, r"seeds must be a sequence, but is 0"),
        ({"seeds": (-1,)}, r"seeds\[0\] must be at least 0"),
        ({"seeds": (3, 3)}, r"seeds must differ"),
        ({"seeds": (0, 2**22)}, r"be below 4194304, but are \[0, 4194304\]"),
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


def test_no_two_predictions_share_their_noise() -> None:
    """Of any images, in any runs; and no attack's search or re-evaluation has it either, whatever seed it was given."""
    indices = torch.cat([run_indices(torch.arange(40), run) for run in (0, 1, 2**22 - 1)])
    found = torch.stack([prediction_seeds(indices, number) for number in range(30)])
    assert found.unique().numel() == found.numel() == 30 * 120
    bases = [derived_seeds(indices, seed) for seed in (0, 1, 0xA45)]
    streams = [derived_seeds(base, stream) for base in bases for stream in (REEVALUATION, RESTART, RESTART + 1)]
    searches = torch.stack([derived_seeds(stream, evaluation) for stream in streams for evaluation in range(30)])
    assert not torch.isin(searches, found).any()


def test_the_noise_of_a_prediction_depends_on_image_and_number_alone() -> None:
    indices = torch.tensor([5, 3, 2**40 + 5])
    whole = prediction_seeds(indices, 4)
    assert torch.equal(prediction_seeds(indices.flip(0), 4), whole.flip(0))
    assert torch.equal(prediction_seeds(indices[1:2], 4), whole[1:2])
