"""Trainings that several processes share.

Each rank writes what it met to ``FOLDER/rank-<r>.json``, and its weights to ``FOLDER/rank-<r>.pt``.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cmap_defense.backbones.networks import Network
from cmap_defense.cli.main import main as command
from cmap_defense.common.files import locked
from cmap_defense.common.ranks import Ranks, ranks
from cmap_defense.errors import CheckpointError, CmapError
from cmap_defense.training.loop import countdown
from cmap_defense.training.objectives import ECT
from cmap_defense.training.run import train_backbone
from training.trained import CONFIG, NETWORK, run, training_images

ODD = {"images": 35, "batch_size": 7, "checkpoint_every": 14}
"""Batches that two processes cannot share equally."""


def commands(folder: Path) -> list[str]:
    """A training on the command line, on images in ``folder``."""
    options = ["--channels", "8,8", "--blocks", "1", "--batch-size", "6", "--checkpoint-every", "12"]
    data = ["--data", str(folder / "data.npz"), "--images", "24", "--precision", "float32"]
    return ["train", *data, *options, "--json", "-o", str(folder / "command")]


def planned(folder: Path, team: Ranks) -> dict[str, Any]:
    """A training whose length is chosen to fit its minutes, by clocks that go at different speeds."""
    times = iter(range(0, 10**6, 7 + 100 * team.rank))
    done = train_backbone(
        training_images(),
        folder,
        network=Network("compact", NETWORK, NETWORK.image_shape),
        objective=ECT(),
        config=CONFIG.replace(images=None, minutes=10.0),
        record=lambda config: {"name": "tiny", "training": {"images_planned": config.images}},
        seconds_left=countdown(10.0, clock=lambda: float(next(times))),
    )
    return {"planned": done.config.images, "seen": done.images_seen, "finished": done.finished}


def in_use(folder: Path, team: Ranks) -> None:
    """A training in a folder that another job has locked."""
    holding = locked(folder, "training", CheckpointError) if team.rank == 0 else contextlib.nullcontext()
    with holding, locked(folder, "training", CheckpointError, team):
        raise AssertionError("nobody was refused")


def helpers(team: Ranks) -> dict[str, Any]:
    """The functions by which ranks exchange values."""
    done: list[int] = []

    def fail() -> None:
        raise CheckpointError("no room")

    said = team.by_first(lambda: done.append(team.rank) or f"by {team.rank}")
    tensors = [torch.full((2, 3), 1.0 + team.rank), torch.tensor(10.0 * (team.rank + 1))]
    tensors.append(torch.full((1, 2, 3, 2), float(team.rank)).to(memory_format=torch.channels_last))
    team.add_up(tensors)
    found: dict[str, Any] = {"said": said, "done": done, "sums": [tensor.flatten().tolist() for tensor in tensors]}
    try:
        team.by_first(fail)
    except CheckpointError as error:
        found["failed"] = str(error)
    return found


def main(folder: Path) -> None:
    met: dict[str, Any] = {}
    weights: dict[str, Any] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            outcome = action()
        except CmapError as error:
            met[name] = {"error": type(error).__name__, "message": str(error)}
        else:
            met[name] = outcome if isinstance(outcome, dict) else {}
            if isinstance(outcome, tuple):
                weights[name] = outcome[0].tensors()

    with ranks() as team:
        met["helpers"] = helpers(team)
        attempt("whole", lambda: run(folder / "whole"))
        attempt("odd", lambda: run(folder / "odd", changes=ODD))
        attempt("begun", lambda: run(folder / "begun"))
        attempt("other", lambda: run(folder / "begun", changes=ODD))
        attempt("at odds", lambda: run(folder / "at-odds", changes={"seed": team.rank}))
        attempt("too many", lambda: run(folder / "too-many", changes={"batch_size": 1}))
        times = iter(range(team.rank * 1000, 10**6, 7))  # the second rank's clock is far ahead
        left = countdown(0.5, clock=lambda: float(next(times)))
        attempt("late", lambda: run(folder / "late", seconds_left=left))
        attempt("planned", lambda: planned(folder / "planned", team))
        attempt("in use", lambda: in_use(folder / "in-use", team))
        attempt("command", lambda: command(commands(folder)))
        (folder / f"rank-{team.rank}.json").write_text(json.dumps(met))
        torch.save(weights, folder / f"rank-{team.rank}.pt")
