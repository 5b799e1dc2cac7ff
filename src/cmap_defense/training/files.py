"""The folder of a training, for one job alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cmap_defense.common.files import FolderLock
from cmap_defense.common.ranks import Ranks
from cmap_defense.errors import CheckpointError


@contextlib.contextmanager
def locked(folder: Path, team: Ranks) -> Iterator[None]:
    """The folder for the processes of this job alone; it is made when it is not there."""
    lock = FolderLock(folder, "training", CheckpointError)
    team.by_first(lock.take)
    try:
        yield
    finally:
        if team.rank == 0:
            lock.release()
