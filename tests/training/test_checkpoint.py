"""Checkpoints: whole or not there, in files of a bounded size, of the same settings or refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.errors import CheckpointError, CheckpointWarning
from cmap_defense.training import checkpoint as module
from cmap_defense.training.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint

SETTINGS = {"train": {"batch_size": 8, "seed": 0}, "objective": {"huber": 0.03}}


def state(step: int) -> Checkpoint:
    """A small state that says which step it is of."""
    weights = {"weights/w": torch.full((50, 40), float(step)), "adam/step/w": torch.tensor(float(step))}
    return Checkpoint(step, SETTINGS, weights)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest_step(folder: Path) -> int | None:
    path = newest_checkpoint(folder, SETTINGS)
    return None if path is None else read_checkpoint(path).step


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(12))
    assert path == tmp_path / "checkpoint-00000012"
    assert names(tmp_path) == ["checkpoint-00000012"]
    assert names(path) == ["index.json", "part-000.safetensors"]
    assert newest_checkpoint(tmp_path, SETTINGS) == path
    found = read_checkpoint(path)
    assert (found.step, found.settings) == (12, SETTINGS)
    assert_same(found.tensors, state(12).tensors)


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (5, 10, 99, 100):
        save_checkpoint(tmp_path, state(step))
    assert names(tmp_path) == ["checkpoint-00000099", "checkpoint-00000100"]
    assert newest_step(tmp_path) == 100


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000002.partial").mkdir()
    (tmp_path / "checkpoint-00000002.partial" / "part-000.safetensors").write_bytes(b"half")
    assert newest_step(tmp_path) is None
    save_checkpoint(tmp_path, state(3))
    assert names(tmp_path) == ["checkpoint-00000003"]


TENSORS = st.dictionaries(
    st.text(st.sampled_from("abc/._é"), min_size=1, max_size=30),
    st.tuples(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]),
        st.lists(st.integers(0, 13), max_size=3),
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=25)
@given(shapes=TENSORS, part=st.integers(2000, 20_000), seed=st.integers(0, 2**31))
def test_parts_are_small_enough_and_make_up_the_whole(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, Any], part: int, seed: int
) -> None:
    """Tensors of any size and kind, empty ones and numbers too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (100 * torch.randn(shape, generator=generator)).to(dtype) for name, (dtype, shape) in shapes.items()
    }
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MEGABYTE", part)
        path = save_checkpoint(folder, Checkpoint(1, {}, tensors), part_mb=1)
    parts = sorted(path.glob("part-*"))
    assert all(file.stat().st_size <= part for file in parts)
    payload = sum(tensor.nbytes for tensor in tensors.values())
    assert len(parts) >= payload / part
    assert_same(read_checkpoint(path).tensors, tensors)


@pytest.mark.parametrize("step", ["parts", "index"])
def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """No room on the disk, for the parts or for the index."""
    save_checkpoint(tmp_path, state(3))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "parts":
            patch.setattr(module, "write_safetensors", full)
        else:
            patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, state(4))
    assert names(tmp_path) == ["checkpoint-00000003"]
    assert newest_step(tmp_path) == 3
    save_checkpoint(tmp_path, state(4))
    assert names(tmp_path) == ["checkpoint-00000003", "checkpoint-00000004"]


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a disk in the network, say; the training would begin anew, and clear it away."""
    save_checkpoint(tmp_path, state(3))

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    for owner, name in ((module, "check_sha256"), (Path, "read_text")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(CheckpointError, match=r"checkpoint-00000003 cannot be read now .*Input/output error"):
                newest_step(tmp_path)
    assert newest_step(tmp_path) == 3


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    """What some file systems leave after a power failure: the length, not the content."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, zero, flip, Path.unlink])
@pytest.mark.parametrize("file", ["index.json", "part-000.safetensors", "part-002.safetensors"])
def test_a_damaged_newest_one_gives_way_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], file: str
) -> None:
    monkeypatch.setattr(module, "MEGABYTE", 4000)
    save_checkpoint(tmp_path, state(3), part_mb=1)
    newest = save_checkpoint(tmp_path, state(4), part_mb=1)
    damage(newest / file)
    with pytest.warns(CheckpointWarning, match="checkpoint-00000004 in .* goes on from checkpoint-00000003"):
        assert newest_step(tmp_path) == 3


def test_what_is_saved_after_damaged_ones_is_kept(tmp_path: Path) -> None:
    """Those of later steps cannot be read, or the training would have gone on from them."""
    for step in (9, 10):
        flip(save_checkpoint(tmp_path, state(step)) / "part-000.safetensors")
    with pytest.warns(CheckpointWarning, match="checkpoint-00000009, checkpoint-00000010 in .* begins anew"):
        assert newest_checkpoint(tmp_path, {}) is None
    save_checkpoint(tmp_path, state(4))
    assert names(tmp_path) == ["checkpoint-00000004"]
    save_checkpoint(tmp_path, state(8))
    assert names(tmp_path) == ["checkpoint-00000004", "checkpoint-00000008"]
    assert newest_step(tmp_path) == 8


@pytest.mark.parametrize("index", [[], {}, {"format": 2}, {"format": 1, "step": 4}, "[" * 10**5])
def test_an_index_that_is_none_gives_way_to_the_one_before(tmp_path: Path, index: Any) -> None:
    save_checkpoint(tmp_path, state(3))
    newest = save_checkpoint(tmp_path, state(4))
    (newest / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.warns(CheckpointWarning, match="goes on from checkpoint-00000003"):
        assert newest_step(tmp_path) == 3


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"train": {"batch_size": 16, "seed": 0}}, r"batch_size: 8 before, 16 now"),
        ({"train": {"batch_size": 8, "seed": 0, "flip": True}}, r"flip: not given before, True now"),
        ({"train": {"batch_size": 8}}, r"seed: 0 before, not given now"),
        ({"network": {"width": 32}}, r"network: not given before, given now"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, here: dict[str, Any], said: str) -> None:
    path = save_checkpoint(tmp_path, state(3))
    with pytest.raises(CheckpointError, match=said) as caught:
        newest_checkpoint(tmp_path, SETTINGS | here)
    assert path.name in str(caught.value)
    assert "huber" not in str(caught.value)
