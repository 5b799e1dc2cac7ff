"""Files of a training's folder: text files that are whole or not there, and the folder for one training alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cmap_defense.errors import CheckpointError
from cmap_defense.ranks import Ranks

__all__ = ["LOCK_FILE", "locked", "write_whole"]

LOCK_FILE = ".lock"


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
    """The folder for the processes of this job alone; it is made when it is not there. The system lets go of the lock
    of a process that was killed.

    Raises:
        CheckpointError: another training has it; on all ranks.
        OSError: nothing can be written there; on all ranks.
    """
    lock = FileLock(folder / LOCK_FILE)
    team.by_first(functools.partial(_take, lock, folder))
    try:
        yield
    finally:
        if team.rank == 0:
            lock.release()


def _take(lock: FileLock, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"Another training is writing to {folder}. Wait for it, stop it, or give another folder."
        ) from error
