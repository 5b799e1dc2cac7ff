"""The length of a training whose schedule ends inside its minutes: measured once, then kept in a file."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from cmap_defense.common.files import write_text
from cmap_defense.common.modules import copied_state, multiplies_bfloat16
from cmap_defense.common.ranks import Ranks
from cmap_defense.common.settings import require_integer
from cmap_defense.errors import CheckpointError, SettingsError
from cmap_defense.training.checkpoint import Checkpoint, newest_whole, refuse_other_checkpoint, save_checkpoint
from cmap_defense.training.config import PRECISIONS, TrainingConfig
from cmap_defense.training.learner import Trainee

Config = TypeVar("Config", bound=TrainingConfig)

PLAN_FILE = "plan.json"
USED = 0.95
"""Fraction of the time that a plan fills; the rest is for what slows a machine down."""

WARM_UP, BLOCK, MOST, SHARE = 3, 5, 50, 0.05
"""Steps that are not timed, steps between two readings of the clock, most steps that are timed, and the fraction of
the minutes that these take at most, unless a block takes longer."""


class Speed(NamedTuple):
    """Seconds of an optimiser step, and of a checkpoint."""

    step: float
    checkpoint: float


def settled(
    config: Config,
    folder: Path,
    parts: Mapping[str, Any],
    team: Ranks,
    seconds_left: Callable[[], float] | None,
    trial: Callable[[Config], Trainee],
    beside: Callable[[Any], object] | None = None,
) -> Config:
    """The settings with a length and a precision: those of the calls before, else by the minutes and the device.

    ``trial`` makes a learner to measure the speed on, and ``beside`` does with it what comes with each checkpoint.
    """
    config = as_before(config, folder, parts, team)
    if config.precision == "auto":
        native = team.shared(multiplies_bfloat16(config.device))
        config = config.replace(precision="bfloat16" if native else "float32")
    if config.images is None and config.minutes is not None and seconds_left is not None:
        config = config.replace(images=planned_images(trial(config), folder, parts, seconds_left, beside))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # or the images might seem not to fit any more
    return config.replace(images=config.length)


def as_before(config: Config, folder: Path, parts: Mapping[str, Any], team: Ranks) -> Config:
    """The settings with the length and the precision of the calls before, where they leave these open."""
    if config.precision == "auto":
        precision = team.by_first(functools.partial(_precision_before, folder))
        config = config.replace(precision=precision or "auto")
    if config.images is not None:
        return config

    def length() -> int | None:
        images, newest = read_plan(folder, _without_length(config, parts)), newest_whole(folder)
        return images if images is not None or newest is None else newest[1]["train"]["images"]

    return config.replace(images=team.by_first(length))


def planned_images(
    learner: Trainee,
    folder: Path,
    parts: Mapping[str, Any],
    seconds_left: Callable[[], float],
    beside: Callable[[Any], object] | None = None,
) -> int:
    """A length that fits into the minutes of the learner's settings; it is written to ``plan.json``.

    The speed is measured on the learner, whose weights are the same afterwards; make another one to train. Under
    torchrun all processes call this, and agree.
    """
    config, team = learner.config, learner.team
    minutes = config.minutes or 0.0
    speed = measure(learner, folder, seconds_left, beside)
    images = team.shared(plan_images(config, speed, seconds_left()))
    if images == 0:
        raise SettingsError(
            f"{minutes:g} minutes are too few: reading the data and measuring the speed (a step takes "
            f"{speed.step:.3g} s, a checkpoint {speed.checkpoint:.3g} s) left {seconds_left():.0f} s. Allow more, "
            "or say how many images to train on."
        )
    rate = config.batch_size / max(speed.step, 1e-9)
    plan = {"images": images, "minutes": minutes, "images_per_second": rate, "settings": _without_length(config, parts)}
    team.by_first(functools.partial(write_text, folder / PLAN_FILE, json.dumps(plan, indent=2) + "\n"))
    return images


def plan_images(config: TrainingConfig, speed: Speed, seconds: float) -> int:
    """Number of images for ``seconds``, in whole steps, checkpoints and the last backbone included; 0 for no step."""
    useful = USED * (seconds - 2 * speed.checkpoint)
    per_step = max(speed.step, 1e-9) + speed.checkpoint / config.checkpoint_steps
    return config.batch_size * max(0, int(useful / per_step))


def read_plan(folder: Path, settings: Mapping[str, Any]) -> int | None:
    """The length in the plan of a training's folder, or None where there is no plan."""
    path = folder / PLAN_FILE
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        images, before = require_integer("plan", "images", plan["images"], minimum=1), dict(plan["settings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no plan of a training ({error!r}). Delete it to plan anew.") from error
    refuse_other_checkpoint(path, before, settings)
    return images


def measure(
    learner: Trainee,
    folder: Path,
    seconds_left: Callable[[], float],
    beside: Callable[[Any], object] | None = None,
) -> Speed:
    """Seconds of a step and of a checkpoint in ``folder``, from a few steps, whose effect is undone."""
    model, team, mode = learner.model, learner.team, learner.model.training
    for left_behind in folder.glob(".trial-*"):  # by a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    before = copied_state(model)
    for number in range(WARM_UP):
        learner.step(number).item()
    begun, spent, done = seconds_left(), 0.0, 0
    while done == 0 or team.shared(done < MOST and spent < SHARE * 60 * (learner.config.minutes or 0.0)):
        losses = [learner.step(done + number) for number in range(BLOCK)]
        done += len(losses)
        losses[-1].item()  # waits for the device
        spent = begun - seconds_left()
    model.eval()

    def samples() -> None:
        if beside is not None:
            beside(learner)

    def checkpoint() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=folder, ignore_cleanup_errors=True) as place:
            state = Checkpoint(0, {}, learner.tensors())
            save_checkpoint(Path(place), state, part_mb=learner.config.checkpoint_part_mb)
        samples()

    team.by_first(samples)  # the first time may compile
    begun = seconds_left()
    team.by_first(checkpoint)
    speed = Speed(spent / done, begun - seconds_left())
    model.train(mode)
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    return speed


def _without_length(config: TrainingConfig, parts: Mapping[str, Any]) -> dict[str, Any]:
    shown = config.reproducible()
    return {"train": {name: value for name, value in shown.items() if name != "images"}, **parts}


def _precision_before(folder: Path) -> str | None:
    """The precision of the checkpoint or the plan in the folder; damaged files are ignored here."""
    newest = newest_whole(folder)
    try:
        found: Any = newest[1] if newest else json.loads((folder / PLAN_FILE).read_text("utf-8"))["settings"]
        precision = found["train"]["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return precision if precision in PRECISIONS else None
