"""A folder for one job at a time."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from cmap_defense.errors import CmapError

__all__ = ["LOCK_FILE", "FolderLock"]

LOCK_FILE = ".lock"


class FolderLock:
    """A lock on a folder, which the system lets go of when its process dies.

    Attributes:
        folder: made when it is not there.
        what: who has it, for messages, such as "training".
        error: what is raised.
    """

    def __init__(self, folder: Path, what: str, error: type[CmapError]) -> None:
        self.folder, self.what, self.error = folder, what, error
        self._lock = FileLock(folder / LOCK_FILE)

    def take(self) -> None:
        """Have the folder.

        Raises:
            CmapError: of the kind ``error``: another job has it, or nothing can be written there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise self.error(
                f"Another {self.what} is writing to {self.folder}. Wait for it, or give another folder. (If there is "
                f"none, remove {self.folder / LOCK_FILE}.)"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise self.error(f"{self.folder} cannot be written to and locked: {error}") from error

    def release(self) -> None:
        """Let go of it."""
        self._lock.release()
