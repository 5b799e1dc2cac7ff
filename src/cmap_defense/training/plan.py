"""How long a training may be so that its schedule ends inside a time budget: measured once, then kept in a file."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cmap_defense.errors import CheckpointError, SettingsError
from cmap_defense.ranks import Ranks, ranks
from cmap_defense.settings import Settings, require_integer, require_number
from cmap_defense.training.budget import Budget
from cmap_defense.training.checkpoint import (
    Checkpoint,
    newest_whole,
    refuse_other_settings,
    save_checkpoint,
    settings_of,
)
from cmap_defense.training.files import write_whole
from cmap_defense.training.learner import Learner
from cmap_defense.training.models import Model
from cmap_defense.training.settings import Execution, TrainSettings

__all__ = ["PLAN_FILE", "Plan", "Speed", "length_so_far", "plan_images", "planned", "read_plan"]

PLAN_FILE = "plan.json"
USED = 0.95
"""The part of the time that a plan fills; the rest is for what slows a machine down."""

WARM_UP, BLOCK, MOST, SHARE = 3, 5, 50, 0.05
"""Steps that are not timed, steps between two looks at the clock, most steps that are timed, and the part of the
budget that these take at most, if a block does not take longer."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds that an optimiser step takes, and seconds that a checkpoint takes."""

    step: float
    checkpoint: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """The length that was chosen for a training, as it stands in ``plan.json``.

    images: the length. minutes: that it was chosen for. images_per_second: as measured, without checkpoints.
    settings: what the training was started with, by part, but for its length.
    """

    images: int
    minutes: float
    images_per_second: float
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        require_integer("Plan", "images", self.images, minimum=1)
        require_number("Plan", "minutes", self.minutes, above=0.0)
        require_number("Plan", "images_per_second", self.images_per_second, above=0.0)
        if not isinstance(self.settings, dict):
            raise SettingsError(f"Plan.settings must be an object, but is {self.settings!r}.")


def planned(
    learner: Learner,
    folder: Path,
    described: Mapping[str, Any],
    budget: Budget,
    execution: Execution,
    beside: Callable[[Model], object] | None = None,
) -> TrainSettings:
    """The learner's settings with the length that the calls before had, or else with one that fits the budget.

    The speed is measured on the learner, whose weights are the same afterwards; make another to train. The plan is
    written into the folder. Under torchrun all processes call this, and agree.

    Args:
        learner: fresh; the length of its settings is no matter.
        folder: of the training.
        described: its further settings by part name; a plan made with others is refused.
        budget: of this call.
        execution: of the training.
        beside: what else each checkpoint takes time for, such as samples, given the model in eval mode.

    Raises:
        CheckpointError: the plan in the folder is one of other settings, or damaged.
        SettingsError: not one step fits into what is left of the budget; nothing is written then.
    """
    settings = learner.settings
    with ranks() as team:
        images = length_so_far(settings, folder, described, team)
        if images is None:
            speed = measure(learner, folder, budget, execution, beside)
            images = team.shared(plan_images(settings, speed, budget.left))
            if images == 0:
                raise SettingsError(
                    f"{budget.minutes:g} minutes are too few: reading the data and measuring the speed (a step takes "
                    f"{speed.step:.3g} s, a checkpoint {speed.checkpoint:.3g} s) left {budget.left:.0f} s. Allow more, "
                    "or say how many images to train on."
                )
            rate = settings.batch_size / max(speed.step, 1e-9)
            parts = _parts(settings, described)
            plan = Plan(images=images, minutes=budget.minutes, images_per_second=rate, settings=parts)
            text = plan.to_json(indent=2) + "\n"
            team.by_first(functools.partial(write_whole, folder / PLAN_FILE, text))
    return settings.replace(images=images)


def plan_images(settings: TrainSettings, speed: Speed, seconds: float) -> int:
    """How many images can be trained on in ``seconds``, in whole steps, checkpoints and the last backbone included; 0
    where not one step fits."""
    useful = USED * (seconds - 2 * speed.checkpoint)
    per_step = max(speed.step, 1e-9) + speed.checkpoint / settings.checkpoint_steps
    return settings.batch_size * max(0, int(useful / per_step))


def read_plan(folder: Path, described: Mapping[str, Any]) -> Plan | None:
    """The plan in a training's folder, or None.

    Raises:
        CheckpointError: it belongs to a training with other settings, or is damaged.
    """
    path = folder / PLAN_FILE
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no plan of a training ({error}). Delete it to plan anew.") from error
    refuse_other_settings(path, plan.settings, described)
    return plan


def length_so_far(settings: TrainSettings, folder: Path, described: Mapping[str, Any], team: Ranks) -> int | None:
    """What the calls before were to train for, in images, by the folder's plan or its newest checkpoint; None where
    there is neither. All ranks agree.

    Raises:
        CheckpointError: the plan in the folder is one of other settings, or damaged.
    """
    return team.by_first(functools.partial(_length_found, folder, _parts(settings, described)))


def _parts(settings: TrainSettings, described: Mapping[str, Any]) -> dict[str, Any]:
    shown = settings.to_dict()
    del shown["images"]
    return {"train": shown, **described}


def _length_found(folder: Path, described: Mapping[str, Any]) -> int | None:
    plan = read_plan(folder, described)
    if plan is not None:
        return plan.images
    newest = newest_whole(folder)
    return None if newest is None else settings_of(newest)["train"]["images"]


def measure(
    learner: Learner,
    folder: Path,
    budget: Budget,
    execution: Execution,
    beside: Callable[[Model], object] | None = None,
) -> Speed:
    """Seconds of a step and of a checkpoint in ``folder``, with what is done beside it: from a few steps, whose effect
    is undone."""
    model, team, clock, mode = learner.model, learner.team, budget.clock, learner.model.training
    for left_behind in folder.glob(".trial-*"):  # by a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    for number in range(WARM_UP):
        learner.step(number).item()
    begun, spent, done = clock(), 0.0, 0
    while done == 0 or team.shared(done < MOST and spent < SHARE * 60 * budget.minutes):
        losses = [learner.step(done + number) for number in range(BLOCK)]
        done += len(losses)
        losses[-1].item()  # waits for the device
        spent = clock() - begun
    model.eval()
    if beside is not None:
        team.by_first(functools.partial(_carry_out, beside, model))  # the first time may compile
    begun = clock()
    team.by_first(functools.partial(_save_on_trial, learner, folder, execution))
    if beside is not None:
        team.by_first(functools.partial(_carry_out, beside, model))
    speed = Speed(spent / done, clock() - begun)
    model.train(mode)
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    return speed


def _carry_out(action: Callable[[Model], object], model: Model) -> None:
    """What comes of it stays here: other ranks would be sent it."""
    action(model)


def _save_on_trial(learner: Learner, folder: Path, execution: Execution) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=folder, ignore_cleanup_errors=True) as place:
        save_checkpoint(Path(place), Checkpoint(0, {}, learner.tensors()), part_mb=execution.part_mb)
