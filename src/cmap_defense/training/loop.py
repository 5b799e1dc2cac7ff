"""The training loop, which continues where it was stopped.

Every draw is a function of (seed, step). So a killed and continued training ends with the same weights, bit for bit on
the same machine with the same number of threads. Under torchrun the processes share each batch. They end with the
weights of one process, up to rounding, to dropout, whose masks each process draws by itself, and to BatchNorm, whose
statistics are those of a process's share. Another number of processes may continue a training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.common.files import write_text
from cmap_defense.common.modules import restoring
from cmap_defense.common.progress import OnProgress, Progress
from cmap_defense.common.ranks import Ranks
from cmap_defense.errors import CheckpointError, TrainingError
from cmap_defense.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    refuse_other_checkpoint,
    save_checkpoint,
)
from cmap_defense.training.learner import Trainee

LOG_FILE = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The argument of ``on_step``.

    Attributes:
        step: optimiser steps done.
        steps: optimiser steps in all.
        loss: newest mean loss that is known; on CUDA it is read every 50 steps.
    """

    step: int
    steps: int
    loss: float


def countdown(minutes: float | None, clock: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """A function that returns the seconds left of these minutes from now on, below 0 when they are over; None: inf."""
    end = math.inf if minutes is None else clock() + 60 * minutes
    return lambda: end - clock()


def train(
    learner: Trainee,
    folder: Path,
    *,
    parts: Mapping[str, Any] | None = None,
    seconds_left: Callable[[], float] | None = None,
    on_step: Callable[[TrainState], None] | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
    ended: Callable[[], bool] | None = None,
    progress: OnProgress = None,
) -> int:
    """Train a learner's model to the end of its training, or until the time is over.

    Under torchrun every process calls this with the same arguments, and ``folder`` is one that all of them share. The
    first one alone writes, and calls ``on_checkpoint``.

    Args:
        learner: fresh; it is overwritten by the newest checkpoint in ``folder``.
        folder: for checkpoints and ``log.jsonl`` (up to 20 lines per checkpoint: step, mean loss since the last line).
        parts: further settings by name, as JSON; a checkpoint that was made with others is refused.
        seconds_left: ``countdown``; below 0 the training stops after the step with a checkpoint, and can be
            continued. None: no limit.
        on_step: called after each step.
        on_checkpoint: called after each checkpoint with the number of steps done, while the model holds the averages
            of the first half-life.
        ended: called before each step; True ends the training early.
        progress: True for a bar on standard error, or a function of (done, total): steps.

    Returns:
        The number of optimiser steps done.

    Raises:
        CheckpointError: ``folder`` belongs to a training with other settings.
        TrainingError: the loss is not finite.
    """
    config, team = learner.config, learner.team
    settings = {"train": config.reproducible(), **(parts or {})}
    newest = team.by_first(functools.partial(newest_checkpoint, folder, settings))
    _agree(team, folder, settings)
    step = 0
    if newest is not None:
        checkpoint = read_checkpoint(newest)
        step = checkpoint.step
        learner.load(checkpoint.tensors)
    log = LossLog(folder / LOG_FILE, learner.device)
    logged, late = step, False
    with Progress(0, "training", wanted=progress, shown=team.rank == 0) as bar:
        while step < config.steps and not late and not (ended is not None and team.shared(ended())):
            loss = learner.step(step)
            step += 1
            log.add(loss)
            bar.at(step, config.steps, remark=f"loss={log.newest:.3f}")
            if on_step is not None:
                on_step(TrainState(step, config.steps, log.newest))
            late = seconds_left is not None and team.shared(seconds_left() <= 0)
            if step % config.checkpoint_steps == 0 or step == config.steps or late:
                means, state = log.means(step), Checkpoint(step, settings, learner.tensors())
                team.by_first(functools.partial(log.write, logged, means, config.batch_size))
                logged = step
                team.by_first(functools.partial(save_checkpoint, folder, state, part_mb=config.checkpoint_part_mb))
                if on_checkpoint is not None:
                    team.by_first(functools.partial(_with_averages, learner, on_checkpoint, step))
    return step


def _agree(team: Ranks, folder: Path, settings: Mapping[str, Any]) -> None:
    """All ranks were started with the settings of the first one; otherwise all of them raise."""
    other = None
    try:
        refuse_other_checkpoint(folder, team.shared(settings), settings)
    except CheckpointError as error:
        other = f"Rank {team.rank} was started with other settings than the first: {error}"
    refusal = team.first_of(other)
    if refusal is not None:
        raise CheckpointError(refusal)


def _with_averages(learner: Trainee, on_checkpoint: Callable[[int], None], step: int) -> None:
    """Call ``on_checkpoint`` with the averages in the model, in eval mode; its own weights are restored."""
    try:
        with restoring(learner.model):
            learner.averages[0].copy_to(learner.model.eval())
            on_checkpoint(step)
    finally:
        learner.model.train()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that can be read: it is for charts, and a damaged one stops nothing."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and {"step", "images", "loss"} <= row.keys():
                    rows.append(row)
    return rows


LINES = 20
"""Of a checkpoint, at most."""

READ_EVERY = 50
"""Steps between two readings from a device that works ahead of the program."""


class LossLog:
    """A file of steps, images seen, and mean losses since the line before: up to 20 lines per checkpoint."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self.newest = math.nan
        self._unread: list[Tensor] = []
        self._since: list[float] = []

    def add(self, loss: Tensor) -> None:
        """Take the loss [] of a step, on the device."""
        self._unread.append(loss.detach())
        if len(self._unread) >= self.every or math.isnan(self.newest):
            self._read()

    def means(self, step: int) -> list[tuple[int, float]]:
        """The losses since the last call, in stretches of about as many steps: last step and mean loss of each."""
        self._read()
        since, self._since = self._since, []
        begun, parts = step - len(since), min(LINES, len(since))
        ends = [len(since) * part // parts for part in range(parts + 1)]
        return [
            (begun + last, math.fsum(since[first:last]) / (last - first)) for first, last in itertools.pairwise(ends)
        ]

    def write(self, begun: int, means: Sequence[tuple[int, float]], batch_size: int) -> None:
        """Append a line for each stretch, and drop the lines that a killed run left."""
        rows = [old for old in read_log(self.path) if old["step"] <= begun]
        rows += [{"step": step, "images": step * batch_size, "loss": loss} for step, loss in means]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self) -> None:
        if not self._unread:
            return
        found = torch.stack(self._unread).tolist()
        self._unread = []
        if not all(map(math.isfinite, found)):
            raise TrainingError.diverged(
                f"The loss, or its gradient, is {next(loss for loss in found if not math.isfinite(loss))}"
            )
        self._since += found
        self.newest = found[-1]
