"""The processes of one job: which of them this one is, and how they exchange values (torch.distributed)."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cmap_defense.errors import CmapError

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=30)
"""How long ranks that are done wait for the others."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes of a job, as one of them sees them.

    Attributes:
        rank: of this process, from 0.
        world: how many processes there are.
    """

    rank: int = 0
    world: int = 1

    def shared(self, value: T) -> T:
        """The value that the first rank has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def first_of(self, value: T | None) -> T | None:
        """Of what the ranks have, that of the first rank that has something."""
        if self.world == 1:
            return value
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, value)
        return next((part for part in found if part is not None), None)

    def by_first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns to the first rank, which alone carries it out while the others wait."""
        if self.world == 1:
            return action()
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = (action(), None)
            except (CmapError, OSError) as error:
                outcome = (None, error)
        value, error = self.shared(outcome)
        if error is not None:
            raise error
        return value

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks; all are of one dtype, on one device."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, sums, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks of this job: those that torchrun started, or this process alone.

    A process group is made where there is none (gloo on the CPU, nccl besides where there is CUDA), and taken down
    again. Each has a part of the job's store to itself: in one that a group before it has used, it would meet the
    addresses of that one.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_available() or (world == 1 and not dist.is_initialized()):
        yield Ranks()
        return
    made = not dist.is_initialized()
    if made:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, world = _meeting_place()
        part = dist.distributed_c10d.PrefixStore(f"cmap-defense-{next(_groups)}", store)
        dist.init_process_group(backend, store=part, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if made:
            dist.destroy_process_group()


_groups = itertools.count()


@functools.cache
def _meeting_place() -> tuple[Any, int, int]:
    """The job's store, this process's rank, and how many there are, by what torchrun put into the environment."""
    from torch.distributed.rendezvous import rendezvous  # which cannot be imported where torch is without distributed

    return next(rendezvous("env://"))
