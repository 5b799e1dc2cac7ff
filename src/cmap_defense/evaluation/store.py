"""The folder of an evaluation: what it is made of, one file per finished piece of work, nothing half-written.

    settings.json                       what decides about the results
    units/<subject>/<attack>/<seed>-<group>.jsonl          a line per image
    units/<subject>/<attack>/<seed>-<group>.safetensors    its tensors, the adversarial images among them
    results.jsonl                       all lines, in order, when all is done
    timings/rank-<r>.jsonl              seconds and backbone passes of each piece

A piece is done when its lines are there: the tensors are written before, and both appear under their names only when
they are whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmap_defense.differences import refuse_other_settings
from cmap_defense.errors import EvaluationError
from cmap_defense.locks import FolderLock

__all__ = ["Store", "Unit", "write_text"]

FORMAT = 2


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """A piece of work: a task by its name, the seed of the run, the number of the group."""

    task: str
    seed: int
    group: int


class Store:
    """An evaluation's folder.

    Args:
        folder: made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder for this job alone.

        Raises:
            EvaluationError: another job has it, or nothing can be written there.
        """
        lock = FolderLock(self.folder, "evaluation", EvaluationError)
        lock.take()
        try:
            yield
        finally:
            lock.release()

    def settings(self) -> dict[str, Any] | None:
        """What the folder's results were made with; None where there is nothing yet.

        Raises:
            EvaluationError: there is something else.
        """
        path = self.folder / "settings.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EvaluationError(f"{path} is not what an evaluation writes: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise EvaluationError(f"{path} was written by another version of this package. Give another folder.")
        return found

    def begin(self, settings: Mapping[str, Any], *, first: bool = True) -> None:
        """Note what the results are made with; only compare it where this is not the first process of the job.

        Raises:
            EvaluationError: those that are there were made with something else; the message says what differs. Or the
                first process has noted nothing, since its folder is another.
        """
        if self.settings() is not None:
            self.compare(settings)
        elif first:
            write_text(self.folder / "settings.json", json.dumps(_with_format(settings), indent=1))
        else:
            raise EvaluationError(f"{self.folder} is not the folder of the first process: all must see the same disk.")

    def compare(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings with those of the results that are there, if there are some. Nothing is written.

        Raises:
            EvaluationError: they differ; the message says where.
        """
        before, now = self.settings(), _with_format(settings)
        if before is None:
            return
        refuse_other_settings(
            _compared(before),
            _compared(now),
            EvaluationError,
            what=f"{self.folder} holds results of another evaluation",
            remedy="Give the same settings to go on with it, or another folder.",
            derived=("checks/", "search"),
        )

    def done(self, unit: Unit) -> bool:
        """Whether that piece is finished."""
        return self._path(unit, ".jsonl").exists()

    def write(self, unit: Unit, lines: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished piece; afterwards it is done."""
        if tensors:
            path = self._path(unit, ".safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = _beside(path)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            with partial.open("r+b") as file:  # fsync of a file to be read only fails on Windows
                os.fsync(file.fileno())
            partial.replace(path)
        write_text(self._path(unit, ".jsonl"), "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def lines(self, unit: Unit) -> list[dict[str, Any]]:
        """The lines of a finished piece."""
        text = self._path(unit, ".jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def tensors(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors of a finished piece, by name; none where it has none.

        Raises:
            EvaluationError: they cannot be read.
        """
        path = self._path(unit, ".safetensors")
        if not path.exists():
            return {}
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise EvaluationError(f"{path} cannot be read: {error}") from error

    def note_time(self, unit: Unit, rank: int, seconds: float, passes: int) -> None:
        """Keep what a piece cost: of no influence on the results, and in files of their own."""
        path = self.folder / "timings" / f"rank-{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = dataclasses.asdict(unit) | {"seconds": round(seconds, 3), "passes": passes}
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                whole = file.read(1) == b"\n"  # or else the job was killed in the middle of a line
                file.write(b"" if whole else b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def timings(self) -> dict[str, tuple[float, int]]:
        """Seconds and backbone passes by task, of the run that finished each piece."""
        latest: dict[Unit, tuple[float, int]] = {}
        for path in sorted((self.folder / "timings").glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line that was being written when the job was killed
                    row = json.loads(line)
                    unit = Unit(row["task"], row["seed"], row["group"])
                    latest[unit] = (row["seconds"], row["passes"])
        sums: dict[str, tuple[float, int]] = {}
        for unit, (seconds, passes) in latest.items():
            before = sums.get(unit.task, (0.0, 0))
            sums[unit.task] = (before[0] + seconds, before[1] + passes)
        return sums

    def _path(self, unit: Unit, suffix: str) -> Path:
        return self.folder / "units" / unit.task / f"{unit.seed}-{unit.group:05d}{suffix}"


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there, on the disk before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _with_format(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as ``settings.json`` holds them."""
    return json.loads(json.dumps({"format": FORMAT, **settings}, allow_nan=False))


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without texts of attacks that are there by name too."""
    tasks = settings.get("tasks", {})
    shown = {
        name: {part: value for part, value in task.items() if part != "attack" or task.get("settings") is None}
        if isinstance(task, dict)
        else task
        for name, task in tasks.items()
    }
    return {**settings, "tasks": shown}


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
