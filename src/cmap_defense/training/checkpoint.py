"""Checkpoints that are whole or not there: written beside, then renamed; the newest whole one is loaded."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from cmap_defense.errors import CheckpointError

__all__ = ["load_newest", "save_checkpoint"]

_NAME = re.compile(r"checkpoint-(\d+)\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``checkpoint-<step>.pt`` and delete all but the ``keep`` newest, 1 at least."""
    path = folder / f"checkpoint-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    for old in _checkpoints(folder)[: -max(1, keep)]:
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint, or None when there is none.

    Only plain tensors and containers are read (``weights_only``). Raises :class:`CheckpointError` when the
    checkpoint was made with other settings; the message lists them.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError):
            continue  # a damaged or foreign file: the one before it may be whole
        if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
            raise CheckpointError(f"{path} is not a checkpoint of this package. Give another folder.")
        differing = {
            f"{part}.{name}: {old.get(name)!r} there, {new.get(name)!r} here"
            for part in settings.keys() | state["settings"].keys()
            for old, new in [(state["settings"].get(part, {}), settings.get(part, {}))]
            for name in old.keys() | new.keys()
            if old.get(name) != new.get(name)
        }
        if differing:
            raise CheckpointError(
                f"{path} was made with other settings ({'; '.join(sorted(differing))}). "
                "Give the same settings to continue it, or another folder to start afresh."
            )
        return state
    return None


def _checkpoints(folder: Path) -> list[Path]:
    found = [(match, path) for path in folder.glob("checkpoint-*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]))]
