"""The losses of a training: read from the device now and then, and their means in ``log.jsonl``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cmap_defense.common.files import write_text
from cmap_defense.errors import TrainingError

LINES = 20
"""Of a checkpoint, at most."""

READ_EVERY = 50
"""Steps between two readings from a device that works ahead of the program."""


class LossLog:
    """A file of steps, images seen, and mean losses since the line before: up to 20 lines per checkpoint.

    Args:
        path: the file.
        device: device of the losses.

    Attributes:
        newest: newest loss that is known. On the CPU it is that of the last step; from CUDA it is read every 50 steps,
            so that no step waits for the device.
    """

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
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        rows = [old for old in rows if old["step"] <= begun]
        rows += [{"step": step, "images": step * batch_size, "loss": loss} for step, loss in means]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self) -> None:
        if not self._unread:
            return
        found = torch.stack(self._unread).tolist()
        self._unread = []
        if not all(map(math.isfinite, found)):
            raise TrainingError(
                f"The loss, or its gradient, is {next(loss for loss in found if not math.isfinite(loss))}: the "
                "training has diverged, and no checkpoint of it is written. Start again in another folder with a "
                "lower learning rate, a longer warm-up, or float32."
            )
        self._since += found
        self.newest = found[-1]
