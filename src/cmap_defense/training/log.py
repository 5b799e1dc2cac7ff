"""The losses of a training: read from the device now and then, and their means in ``log.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from cmap_defense.errors import TrainingError
from cmap_defense.training.files import write_whole

__all__ = ["LossLog"]

READ_EVERY = 50
"""Steps between two readings from a device that works ahead of the program."""


class LossLog:
    """One line per checkpoint: step, images, mean loss since the last one.

    path: of the file. device: of the losses. newest: the newest loss that is known. It is that of the last step on the
    CPU; a CUDA device would have to be waited for, so there it is read every 50 steps, and at checkpoints.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self.newest = math.nan
        self._unread: list[Tensor] = []
        self._since: list[float] = []

    def add(self, loss: Tensor) -> None:
        """Take the loss [] of a step, on the device.

        Raises:
            TrainingError: a loss is infinite or no number.
        """
        self._unread.append(loss.detach())
        if len(self._unread) >= self.every or math.isnan(self.newest):
            self._read()

    def mean(self) -> float:
        """Of the losses since the last call. Raises as :meth:`add`."""
        self._read()
        since, self._since = self._since, []
        return math.fsum(since) / len(since)

    def write(self, step: int, images: int, loss: float) -> None:
        """Append one line, dropping lines of the same or later steps that a killed run left behind."""
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        rows = [old for old in rows if old["step"] < step] + [{"step": step, "images": images, "loss": loss}]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self) -> None:
        if not self._unread:
            return
        found = torch.stack(self._unread).tolist()
        self._unread = []
        if not all(map(math.isfinite, found)):
            raise TrainingError(
                f"The loss, or its gradient, is {next(loss for loss in found if not math.isfinite(loss))}: the "
                "training has diverged, and no checkpoint of it is written. Start afresh in another folder with a "
                "lower learning rate, a longer warm-up, or float32."
            )
        self._since += found
        self.newest = found[-1]
