"""The processes of one job: which of them this one is, and what they tell each other (torch.distributed)."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = ["Ranks", "ranks"]

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=30)
"""How long ranks that are done wait for the others."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """rank: of this process, from 0. world: how many there are. local: its number on its node."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def shared(self, value: T) -> T:
        """The value that the first rank has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks of this job: those that torchrun started, or this process alone.

    A process group is made where there is none (gloo on the CPU, nccl besides where there is CUDA), and taken down
    again.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_available() or (world == 1 and not dist.is_initialized()):
        yield Ranks()
        return
    made = not dist.is_initialized()
    if made:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if made:
            dist.destroy_process_group()
