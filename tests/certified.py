"""Smoothed classifiers that are known in closed form, and certifications in processes of their own.

``torchrun --nproc-per-node=2 certified.py FOLDER`` certifies as two ranks, and writes what each of them found to
``FOLDER/rank-<r>.pt``.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense import SmoothedClassifier, certify
from cmap_defense.certification import CertificationResult, run
from patience import HANGS
from toys import noise, uniform

SHAPE = (2, 3, 4)
SMALL: dict[str, Any] = {"n0": 5, "n": 30, "batch_size": 8}


class HalfSpace(nn.Module):
    """Class 1 where w x > threshold, |w| = 1: smoothed, its radius is |w x - threshold|, for every sigma."""

    def __init__(self, shape: tuple[int, ...] = SHAPE, threshold: float = 0.0) -> None:
        super().__init__()
        direction = noise(*shape, seed=4)
        self.weight = nn.Parameter(direction / direction.norm(), requires_grad=False)
        self.threshold = threshold

    def margin(self, images: Tensor) -> Tensor:
        return (images * self.weight).flatten(1).sum(dim=1) - self.threshold

    def forward(self, images: Tensor) -> Tensor:
        margin = self.margin(images)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


def images_of(count: int = 3) -> Tensor:
    return uniform(count, *SHAPE, seed=8)


def small(out: Path | None = None, *, count: int = 3, **changes: Any) -> CertificationResult:
    """A certification that takes a moment."""
    return certify(SmoothedClassifier(HalfSpace(), None), images_of(3)[:count], out=out, **(SMALL | changes))


def killed(folder: Path, after: int) -> None:
    """Certify, writing counts after each batch, and be killed after so many batches of this process."""
    run.EVERY = 0.0
    calls = iter(range(after))

    def progress(*_: int) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    small(folder, progress=progress)


def together(folder: Path) -> None:
    """What one of two ranks finds, with a folder and without, and of one image, which leaves a rank without work."""
    found = {"folder": small(folder / "out"), "nowhere": small(), "one": small(folder / "one", count=1)}
    torch.save({name: vars(result) for name, result in found.items()}, folder / f"rank-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    import certified  # under the name by which the tests know its classes

    torch.set_num_threads(1)
    signal.alarm(HANGS - 60)
    run.EVERY = 0.0
    certified.together(Path(sys.argv[1]))
