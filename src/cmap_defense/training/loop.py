"""The training loop: a function of (model, images, settings, folder) that continues where it was stopped.

Every draw is a function of (seed, step), so a killed and continued training ends with the same weights, bit for bit
on the same machine with the same number of threads. Under torchrun the processes share each batch: they end with the
weights that one process would have, up to rounding (and but for dropout, whose masks each process draws by itself), and
a training may be continued by another number of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.errors import CheckpointError, DataError
from cmap_defense.ranks import Ranks, ranks
from cmap_defense.training.budget import Budget
from cmap_defense.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    refuse_other_settings,
    save_checkpoint,
)
from cmap_defense.training.ema import EMA
from cmap_defense.training.learner import Learner
from cmap_defense.training.log import LossLog
from cmap_defense.training.models import Model
from cmap_defense.training.objectives import Objective
from cmap_defense.training.precision import resolve_precision
from cmap_defense.training.settings import Execution, TrainSettings

__all__ = ["LOG_FILE", "TrainState", "Trained", "check_data", "train"]

LOG_FILE = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """What ``on_step`` sees after each optimiser step: steps done, of how many, and the newest mean loss that is known.

    On the CPU it is the loss of this step. On CUDA it is read every 50 steps, so that no step waits for the device.
    """

    step: int
    steps: int
    loss: float


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """step: optimiser steps done, of ``steps``; fewer where a budget was spent. averages: the averaged weights, one per
    half-life of the settings."""

    step: int
    steps: int
    averages: tuple[EMA, ...]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps


def train(
    model: Model,
    images: Tensor,
    objective: Objective,
    settings: TrainSettings,
    folder: Path,
    *,
    described: Mapping[str, Any],
    labels: Tensor | None = None,
    budget: Budget | None = None,
    execution: Execution | None = None,
    on_step: Callable[[TrainState], None] | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> Trained:
    """Train ``model`` in place and return the averaged weights.

    Under torchrun every process calls this with the same arguments, and ``folder`` is one that all of them see; the
    first one alone writes, and calls ``on_checkpoint``.

    Args:
        model: fresh, of the objective's kind; its weights are overwritten by the checkpoint's when ``folder`` holds
            one.
        images: uint8 [N, C, H, W], the training set, on the CPU.
        objective: losses per image.
        settings: of the loop.
        folder: receives checkpoints and ``log.jsonl`` (up to 20 lines per checkpoint: step, mean loss since the last).
        described: further settings by part name, as JSON; a checkpoint made with others is refused.
        labels: int64 [N], for a class-conditional model.
        budget: when it is spent, the training stops after the step, with a checkpoint, and can be continued.
        execution: how it is carried out.
        on_step: called after each step.
        on_checkpoint: called after each checkpoint with the steps done, the averages of the first half-life being in
            ``model`` meanwhile.

    Raises:
        DataError: images or labels do not fit the model.
        SettingsError: the objective trains another kind of model, or there are more processes than images in a batch.
        CheckpointError: ``folder`` belongs to a training with other settings.
        TrainingError: the loss is infinite or no number.
    """
    check_data(model, images, labels)
    execution = execution or Execution()
    with ranks() as team:
        settings = resolve_precision(settings, next(model.parameters()).device, folder, team)
        model.train()  # before a target is copied from it
        learner = Learner(model, images, labels, objective, settings, execution, team)
        described = {"train": settings.to_dict(), **described}
        newest = team.by_first(functools.partial(_opened, folder, described))
        _agree(team, folder, described)
        step = 0
        if newest is not None:
            checkpoint = read_checkpoint(newest)
            step = checkpoint.step
            learner.load(checkpoint.tensors)
        log = LossLog(folder / LOG_FILE, learner.device)
        logged, late = step, False
        while step < settings.steps and not late:
            loss = learner.step(step)
            step += 1
            log.add(loss)
            if on_step is not None:
                on_step(TrainState(step, settings.steps, log.newest))
            late = budget is not None and team.shared(budget.left <= 0)
            if step % settings.checkpoint_steps == 0 or step == settings.steps or late:
                means, state = log.means(step), Checkpoint(step, described, learner.tensors())
                team.by_first(functools.partial(log.write, logged, means, settings.batch_size))
                logged = step
                team.by_first(functools.partial(save_checkpoint, folder, state, part_mb=execution.part_mb))
                if on_checkpoint is not None:
                    team.by_first(functools.partial(_shown, learner, on_checkpoint, step))
        return Trained(step, settings.steps, learner.averages)


def check_data(model: Model, images: Tensor, labels: Tensor | None) -> None:
    """Raises :class:`DataError` unless these are images, and labels, that the model can be trained on."""
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != tuple(model.image_shape):
        raise DataError(
            f"Training images must be uint8 [N, {', '.join(map(str, model.image_shape))}], "
            f"but are {images.dtype} {list(images.shape)}."
        )
    if len(images) == 0:
        raise DataError("The training set is empty.")
    if (labels is None) != (model.num_classes is None):
        needed = "needs labels" if labels is None else "takes no labels"
        raise DataError(f"A model with num_classes={model.num_classes} {needed}.")
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise DataError(f"Labels must be int64 [{len(images)}], but are {labels.dtype} {list(labels.shape)}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= (model.num_classes or 0):
        raise DataError(f"Labels go from {low} to {high}, but the model has {model.num_classes} classes.")


def _opened(folder: Path, described: Mapping[str, Any]) -> Path | None:
    """The folder's newest checkpoint; the folder is made when it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return newest_checkpoint(folder, described)


def _agree(team: Ranks, folder: Path, described: Mapping[str, Any]) -> None:
    """All ranks were started with the settings of the first; all of them raise where not."""
    other = None
    try:
        refuse_other_settings(folder, team.shared(described), described)
    except CheckpointError as error:
        other = f"Rank {team.rank} was started with other settings than the first: {error}"
    refusal = team.first_of(other)
    if refusal is not None:
        raise CheckpointError(refusal)


def _shown(learner: Learner, on_checkpoint: Callable[[int], None], step: int) -> None:
    """Call ``on_checkpoint`` with the averages in the model, in eval mode, its own weights being back afterwards."""
    model = learner.model
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        learner.averages[0].copy_to(model)
        model.eval()
        on_checkpoint(step)
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(own[name])
        model.train()
