"""Files of a training's folder: text files that are whole or not there, and the folder for one training alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cmap_defense.common.files import FolderLock
from cmap_defense.common.ranks import Ranks
from cmap_defense.errors import CheckpointError

__all__ = ["locked", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, team: Ranks) -> Iterator[None]:
    """The folder for the processes of this job alone; it is made when it is not there.

    Raises:
        CheckpointError: another training has it, or nothing can be written there; on all ranks.
    """
    lock = FolderLock(folder, "training", CheckpointError)
    team.by_first(lock.take)
    try:
        yield
    finally:
        if team.rank == 0:
            lock.release()
