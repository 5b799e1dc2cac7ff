"""The folder of an evaluation: settings, a line per image and attack, adversarial images, and timings.

A work unit appears under its name only when it is whole: first its tensors, then its lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmap_defense.common.files import refuse_evaluations_below, refuse_other_settings, write_text, written_whole
from cmap_defense.errors import EvaluationError

FORMAT = 3

WRITTEN = ("results.jsonl", "report.json", "report.md", "report.html")
"""Files at the end of an evaluation."""


@dataclasses.dataclass(frozen=True, order=True)
class WorkUnit:
    """What is done at once, by one process: a group of images in the run of a seed, for a task."""

    task: str
    seed: int
    group: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """What the finished work units of a task cost: images of all runs, seconds, and network passes of backbones."""

    images: int = 0
    seconds: float = 0.0
    passes: int = 0

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.images + other.images, self.seconds + other.seconds, self.passes + other.passes)


class ResultsFolder:
    """An evaluation's folder, which is made when it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def settings(self) -> dict[str, Any] | None:
        """The settings of the folder's results; None where there are none yet."""
        path = self.path / "settings.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EvaluationError(f"{path} is not what an evaluation writes ({error}): give another folder.") from error
        if not isinstance(found, dict) or "format" not in found or "tasks" not in found:
            raise EvaluationError(f"{path} is not that of an evaluation. Give another folder.")
        if found["format"] != FORMAT:
            raise EvaluationError(f"{path} was written by another version of this package. Give another folder.")
        return found

    def begin(self, settings: Mapping[str, Any], *, first: bool = True) -> None:
        """Write the settings, or compare them with those that are there and note the tasks that they change: files of
        a report on other tasks are removed."""
        self.compare(settings)
        before, now = self.settings(), _with_format(settings)
        wanted = now if before is None else _installed_since(before, now) | {"tasks": now["tasks"]}
        if wanted == before:
            return
        if first:
            for name in WRITTEN:
                (self.path / name).unlink(missing_ok=True)
            write_text(self.path / "settings.json", json.dumps(wanted, indent=1))
        else:
            raise EvaluationError(f"{self.path} is not the folder of the first process: all must see the same disk.")

    def compare(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings with those of the results that are there, if there are some. Tasks may be added, and
        those changed or left out of which nothing is done. Nothing is written."""
        before = self.settings()
        if before is None:
            self._refuse_foreign()
            return
        now = _with_format(settings)
        begun = {name: task for name, task in before["tasks"].items() if self._begun(name)}
        old = _installed_since(before, now)
        other = [name for name, task in begun.items() if now["tasks"].get(name) != task]
        remedy = "Give the same settings to go on with it, or another folder."
        if old | {"tasks": {}} == now | {"tasks": {}}:
            folders = ", ".join(str(self.path / "units" / name) for name in other)
            remedy += f" To do without the results of these tasks, delete {folders}."
        refuse_other_settings(
            old | {"tasks": now["tasks"] | begun},
            now,
            EvaluationError,
            what=f"{self.path} holds results of another evaluation",
            remedy=remedy,
            derived=("checks/", "search"),
            why_derived=" This follows from the attacks: the checks repeat one of them, and clean images are "
            "predicted as often as the longest search does.",
        )

    def _refuse_foreign(self) -> None:
        """Raise where the folder, which has no settings, has results, or files that an evaluation would overwrite."""
        refuse_evaluations_below(self.path, EvaluationError)
        found = [name for name in WRITTEN if (self.path / name).exists()]
        found += ["units"] if any((self.path / "units").rglob("*.jsonl")) else []
        if found:
            raise EvaluationError(
                f"{self.path} holds {', '.join(found)} of something else, or settings.json has been removed. Give "
                "another folder."
            )

    def _begun(self, task: str) -> bool:
        """Whether a work unit of a task is finished."""
        return any((self.path / "units" / task).glob("*.jsonl"))

    def done(self, unit: WorkUnit) -> bool:
        """Whether a work unit is finished."""
        return self._file(unit, ".jsonl").exists()

    def write(self, unit: WorkUnit, lines: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished work unit; afterwards it is done."""
        if tensors:
            kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
            written_whole(self._file(unit, ".safetensors"), lambda path: save_file(kept, path))
        write_text(self._file(unit, ".jsonl"), "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def lines(self, unit: WorkUnit) -> list[dict[str, Any]]:
        """The lines of a finished work unit."""
        path = self._file(unit, ".jsonl")
        try:
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):
                raise ValueError("it is cut off")
            return [json.loads(line) for line in text.splitlines()]
        except ValueError as error:
            raise EvaluationError(f"{path} cannot be read ({error}): delete it, and it is made again.") from error

    def tensors(self, unit: WorkUnit) -> dict[str, Tensor]:
        """The tensors of a finished work unit, by name; none where it has none."""
        path = self._file(unit, ".safetensors")
        if not path.exists():
            return {}
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            lines = self._file(unit, ".jsonl")
            raise EvaluationError(
                f"{path} cannot be read ({error}): delete it and {lines.name} beside it, and both are made again."
            ) from error

    def note_timing(self, unit: WorkUnit, rank: int, timing: Timing) -> None:
        """Keep what a work unit cost, in a file of each process: it has no influence on the results."""
        path = self.path / "timings" / f"rank-{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = dataclasses.asdict(unit) | dataclasses.asdict(timing)
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                whole = file.read(1) == b"\n"  # or else the job was killed in the middle of a line
                file.write(b"" if whole else b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def timings(self) -> dict[str, Timing]:
        """By task, of the process that finished each work unit."""
        latest: dict[WorkUnit, Timing] = {}
        for path in sorted((self.path / "timings").glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line that was being written when the job was killed
                    row = json.loads(line)
                    unit = WorkUnit(row["task"], row["seed"], row["group"])
                    latest[unit] = Timing(row["images"], row["seconds"], row["passes"])
        sums: dict[str, Timing] = {}
        for unit, timing in latest.items():
            sums[unit.task] = sums.get(unit.task, Timing()) + timing
        return sums

    def _file(self, unit: WorkUnit, suffix: str) -> Path:
        return self.path / "units" / unit.task / f"{unit.seed}-{unit.group:05d}{suffix}"


def _installed_since(before: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's settings with the version of a library of attacks that was not there before: no result is its."""
    computation, name = before.get("computation", {}), "pyautoattack"
    if computation.get(name, name) is not None:
        return before
    return before | {"computation": computation | {name: now.get("computation", {}).get(name)}}


def _with_format(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as ``settings.json`` holds them."""
    return json.loads(json.dumps({"format": FORMAT, **settings}, allow_nan=False))
