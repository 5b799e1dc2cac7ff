"""Checkpoints: whole or not there, of the same settings or refused, read without running what they hold."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cmap_defense.errors import CheckpointError
from cmap_defense.training.checkpoint import load_newest, save_checkpoint

SETTINGS = {"train": {"batch_size": 8, "seed": 0}, "objective": {"huber": 0.03}}


def state(step: int) -> dict[str, Any]:
    """A small state that says which step it is of."""
    return {"step": step, "settings": SETTINGS, "weights": {"w": torch.full((50, 40), float(step))}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, state(12))
    assert path == tmp_path / "checkpoint-00000012.pt"
    assert names(tmp_path) == ["checkpoint-00000012.pt"]
    found = load_newest(tmp_path, SETTINGS)
    assert found is not None
    assert found["step"] == 12
    assert torch.equal(found["weights"]["w"], state(12)["weights"]["w"])


def test_an_empty_folder_holds_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path, SETTINGS) is None


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (5, 10, 100, 99):
        save_checkpoint(tmp_path, step, state(step))
    assert names(tmp_path) == ["checkpoint-00000099.pt", "checkpoint-00000100.pt"]
    found = load_newest(tmp_path, SETTINGS)
    assert found is not None
    assert found["step"] == 100


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, state(3))
    for name in ("checkpoint-best.pt", "checkpoint-.pt", "my-checkpoint-00000009.pt", "checkpoint-00000009.partial"):
        (tmp_path / name).write_bytes(b"nothing")
    found = load_newest(tmp_path, SETTINGS)
    assert found is not None
    assert found["step"] == 3
    save_checkpoint(tmp_path, 4, state(4), keep=1)
    assert names(tmp_path) == [
        "checkpoint-.pt",
        "checkpoint-00000004.pt",
        "checkpoint-00000009.partial",
        "checkpoint-best.pt",
        "my-checkpoint-00000009.pt",
    ]


def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(tmp_path: Path) -> None:
    """A state that cannot be pickled fails midway through the writing."""
    save_checkpoint(tmp_path, 3, state(3))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path, 4, state(4) | {"unpicklable": lambda: None})
    assert (tmp_path / "checkpoint-00000003.pt").exists()
    assert not (tmp_path / "checkpoint-00000004.pt").exists()
    found = load_newest(tmp_path, SETTINGS)
    assert found is not None
    assert found["step"] == 3
    save_checkpoint(tmp_path, 4, state(4))
    assert names(tmp_path) == ["checkpoint-00000003.pt", "checkpoint-00000004.pt"]


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 100, 0.5, 0.9, -1])
def test_a_truncated_newest_one_gives_way_to_the_one_before(tmp_path: Path, kept: float) -> None:
    """Cut to ``kept`` bytes, to that share of its length, or by one byte."""
    save_checkpoint(tmp_path, 3, state(3))
    newest = save_checkpoint(tmp_path, 4, state(4))
    length = newest.stat().st_size
    os.truncate(newest, int(kept * length) if 0 < kept < 1 else kept % length)
    found = load_newest(tmp_path, SETTINGS)
    assert found is not None
    assert found["step"] == 3


def test_a_newest_one_of_zeros_gives_way_to_the_one_before(tmp_path: Path) -> None:
    """What some file systems leave after a power failure: the length, not the content."""
    save_checkpoint(tmp_path, 3, state(3))
    newest = save_checkpoint(tmp_path, 4, state(4))
    newest.write_bytes(bytes(newest.stat().st_size))
    found = load_newest(tmp_path, SETTINGS)
    assert found is not None
    assert found["step"] == 3


def test_when_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    for step in (3, 4):
        os.truncate(save_checkpoint(tmp_path, step, state(step)), 100)
    assert load_newest(tmp_path, SETTINGS) is None


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"train": {"batch_size": 16, "seed": 0}}, r"train\.batch_size: 8 there, 16 here"),
        ({"train": {"batch_size": 8, "seed": 0, "flip": True}}, r"train\.flip: None there, True here"),
        ({"train": {"batch_size": 8}}, r"train\.seed: 0 there, None here"),
        ({"network": {"width": 32}}, r"network\.width: None there, 32 here"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, here: dict[str, Any], said: str) -> None:
    path = save_checkpoint(tmp_path, 3, state(3))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_newest(tmp_path, SETTINGS | here)
    assert path.name in str(caught.value)
    assert "huber" not in str(caught.value)


def test_a_part_that_is_missing_here_is_refused_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, state(3))
    with pytest.raises(CheckpointError, match=r"objective\.huber: 0\.03 there, None here"):
        load_newest(tmp_path, {"train": SETTINGS["train"]})


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(tmp_path: Path, how: str) -> None:
    """Neither a bare pickle nor one inside torch's own format; it is refused, or the one before it is loaded."""
    target = tmp_path / "harm"
    pickle.loads(pickle.dumps(Malicious(target)))  # it would do harm
    target.rmdir()
    save_checkpoint(tmp_path, 3, state(3))
    content = state(4) | {"payload": Malicious(target)}
    with (tmp_path / "checkpoint-00000004.pt").open("wb") as file:
        if how == "pickle":
            pickle.dump(content, file, protocol=2)
        else:
            torch.save(content, file)
    try:
        found = load_newest(tmp_path, SETTINGS)
    except (CheckpointError, pickle.UnpicklingError):
        found = None
    assert not target.exists()
    assert found is None or found["step"] == 3
