"""Files of results: written whole or not at all, in a folder that one job has to itself.

The settings of earlier results are compared with those given now, and what differs is named, one line per option.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from cmap_defense.common.paths import expanded
from cmap_defense.common.ranks import Ranks
from cmap_defense.common.settings import in_255ths
from cmap_defense.errors import CmapError, MissingExtraError

LOCK_FILE = ".lock"

CONTEXT = 30
"""Characters that are shown beside a difference of long texts."""

LISTED = 12
"""Lines of a refusal, at most."""

CONTAINERS = {"models", "defended", "tasks", "settings", "threat", "attack", "protocol", "computation", "train"}
"""Groups of settings that say nothing about an option inside them."""

LOGITS = "logits"
"""The name of a model's logits on the first image, which are compared as numbers."""

MISSING = object()

Place = tuple[str, ...]


def written_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, by what writes it beside its place, that is whole or not there, and on the disk before it has its
    name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("r+b") as file:  # fsync of a file to be read only fails on Windows
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    written_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def as_json(value: Any) -> Any:
    """A value as JSON: objects by their ``to_dict``, dataclasses by their fields, tensors and tuples as lists, numbers
    that are not finite as None."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fields_as_json(value)
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if isinstance(value, Tensor):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fields_as_json(made: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON."""
    return {field.name: as_json(getattr(made, field.name)) for field in dataclasses.fields(made)}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all. Raises ValueError for NaN and infinite numbers, which JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_findings(
    folder: str | Path, name: str, values: Any, text: str | None, drawn: Callable[[], str | bytes], file: str
) -> tuple[list[Path], str | None]:
    """``name.json``, with a text ``name.md``, and what is drawn where its extra is installed: the files, and what is
    missing."""
    folder = expanded(folder)
    written = [folder / f"{name}.json"]
    write_json(written[0], values)
    if text is not None:
        written.append(folder / f"{name}.md")
        write_text(written[1], text)
    try:
        picture = drawn()
    except MissingExtraError as error:
        return written, str(error)
    content = picture.encode("utf-8") if isinstance(picture, str) else picture
    written_whole(folder / file, lambda partial: partial.write_bytes(content))
    return [*written, folder / file], None


@contextlib.contextmanager
def locked(folder: Path, what: str, error: type[CmapError], team: Ranks | None = None) -> Iterator[None]:
    """A folder for the processes of this job, such as a training, alone; the system unlocks it when its process dies.

    It is made when it is not there. Where another job has it, or nothing can be written there, all ranks raise
    ``error``.
    """
    lock, team = FileLock(folder / LOCK_FILE), team or Ranks()

    def take() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise error(
                f"Another {what} is writing to {folder}. Wait for it, or give another folder. (If there is none, "
                f"remove {folder / LOCK_FILE}.)"
            ) from problem
        except (OSError, NotImplementedError) as problem:
            raise error(f"{folder} cannot be written to and locked: {problem}") from problem

    team.by_first(take)
    try:
        yield
    finally:
        if team.rank == 0:
            lock.release()


def tensor_checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and contents of tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(np.ascontiguousarray(whole.reshape(-1).view(torch.uint8).numpy()).data if whole.numel() else b"")
    return digest.hexdigest()


def refuse_evaluations_below(path: Path, error: type[CmapError]) -> None:
    """Raise ``error`` where folders in this one hold evaluations, as in that of a comparison or study."""
    for settings in path.glob("[!.]*/settings.json"):
        with contextlib.suppress(ValueError):
            found = json.loads(settings.read_text(encoding="utf-8"))
            if isinstance(found, dict) and {"format", "tasks"} <= found.keys():
                raise error(f"{path} holds evaluations, such as {settings.parent}: give another folder.")


def refuse_other_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    error: type[CmapError],
    *,
    what: str,
    remedy: str,
    derived: Sequence[str] = (),
    why_derived: str = "",
) -> None:
    """Refuse to go on with results that were made with other settings, by an error that names each difference.

    ``what`` begins the message and ``remedy`` ends it, with ``why_derived`` where nothing differs but what is derived.
    """
    now = json.loads(json.dumps(now, allow_nan=False))
    lines = differences(before, now, derived=derived)
    if lines:
        remedy += why_derived if all(_is_derived(place, derived) for place, _, _ in _changes(before, now, ())) else ""
        more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise error("\n  ".join([f"{what}:", *lines[:LISTED], *more]) + f"\n{remedy}")


def differences(before: Any, now: Any, *, derived: Sequence[str] = ()) -> list[str]:
    """What differs between two JSON values: a line per option, such as "eps: 8/255 before, 4/255 now".

    An option that changed alike in several places, such as the size of all attacks, has one line. ``derived`` names
    entries that follow from others, or how they begin up to a "/"; they are left out where others differ.
    """
    found = [(place, *_shown(old, new)) for place, old, new in _changes(before, now, ())]
    kept = [change for change in found if not _is_derived(change[0], derived)]
    changes = kept or found
    names = {place: _name(place) for place, _, _ in changes}
    values: dict[str, set[tuple[str, str]]] = {}
    for place, old, new in changes:
        values.setdefault(names[place], set()).add((old, new))
    lines = {
        f"{names[place] if len(values[names[place]]) == 1 else '.'.join(place)}: {old} before, {new} now": None
        for place, old, new in changes
    }
    return list(lines)


def _is_derived(place: Place, derived: Sequence[str]) -> bool:
    groups = tuple(name for name in derived if name.endswith("/"))
    return any(part in derived or part.startswith(groups) for part in place)


def _changes(before: Any, now: Any, place: Place) -> Iterator[tuple[Place, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys(), key=str):
            yield from _changes(before.get(name, MISSING), now.get(name, MISSING), (*place, str(name)))
    elif before is MISSING or now is MISSING or not (before == now or _equal_logits(before, now, place)):
        yield place, before, now


def _equal_logits(before: Any, now: Any, place: Place) -> bool:
    """Whether both are logits, up to what rounding on another machine of the kind may change."""
    if place[-1:] != (LOGITS,) or not isinstance(before, list) or not isinstance(now, list):
        return False
    largest = max((abs(value) for value in before), default=0.0)
    return len(before) == len(now) and all(
        math.isclose(one, other, abs_tol=1e-2 * largest) for one, other in zip(before, now, strict=True)
    )


def _name(place: Place) -> str:
    """An option by its last part, and by the one before where that is no mere container."""
    if place[-1:] == (LOGITS,) and len(place) > 1:
        return f"logits of {place[-2]} on the first image"
    shown = [part for part in place[:-1] if part not in CONTAINERS and "/" not in part]
    return ".".join([*shown[-1:], *place[-1:]])


def _shown(before: Any, now: Any) -> tuple[str, str]:
    """Two values as texts that differ."""
    old, new = _text(before), _text(now)
    if old == new:
        old, new = repr(before), repr(now)
    return _shortened(old, new)


def _text(value: Any) -> str:
    if value is MISSING:
        return "not given"
    if isinstance(value, dict):
        return str(value.get("name") or value.get("class") or "given")
    if isinstance(value, float) and len(repr(value)) > 6:
        return in_255ths(value) or repr(value)
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    return value if isinstance(value, str) and value.strip() == value != "" else repr(value)


def _shortened(before: str, now: str) -> tuple[str, str]:
    """Two long texts, cut down to where they differ and a few words around it."""
    if max(len(before), len(now)) <= 4 * CONTEXT:
        return before, now
    same = len(os.path.commonprefix([before, now]))  # noqa: RUF071 - texts, not paths
    rest = len(os.path.commonprefix([before[same:][::-1], now[same:][::-1]]))  # noqa: RUF071
    begin = max(0, same - CONTEXT)
    ends = [len(text) - max(0, rest - CONTEXT) for text in (before, now)]
    shown = [
        ("..." if begin else "") + text[begin:end] + ("..." if end < len(text) else "")
        for text, end in zip((before, now), ends, strict=True)
    ]
    return shown[0], shown[1]
