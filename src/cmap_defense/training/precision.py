"""Which precision a training runs in where its settings leave the choice open."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from cmap_defense.modules import multiplies_bfloat16
from cmap_defense.ranks import Ranks
from cmap_defense.training.checkpoint import newest_whole, settings_of
from cmap_defense.training.plan import PLAN_FILE
from cmap_defense.training.settings import PRECISIONS, TrainSettings

__all__ = ["resolve_precision"]


def resolve_precision(settings: TrainSettings, device: torch.device | str, folder: Path, team: Ranks) -> TrainSettings:
    """The settings with "bfloat16" or "float32" in place of "auto": that of the training in ``folder``, or else the
    faster one on ``device``. All processes agree."""
    if settings.precision != "auto":
        return settings
    return settings.replace(precision=team.by_first(functools.partial(_chosen, torch.device(device), folder)))


def _chosen(device: torch.device, folder: Path) -> str:
    begun = _begun_with(folder)
    return begun or ("bfloat16" if multiplies_bfloat16(device) else "float32")


def _begun_with(folder: Path) -> str | None:
    """The precision of the training whose checkpoint or plan is in the folder; damaged files are another's concern."""
    newest = newest_whole(folder)
    try:
        found: Any = settings_of(newest) if newest else json.loads((folder / PLAN_FILE).read_text("utf-8"))["settings"]
        precision = found["train"]["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return precision if precision in PRECISIONS else None
