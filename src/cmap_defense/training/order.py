"""Which images step s sees: a function of (seed, s) alone, so that a resumed training sees the same."""

from __future__ import annotations

import torch
from torch import Tensor

from cmap_defense.rng import generator_for

__all__ = ["DataOrder"]


class DataOrder:
    """Epoch after epoch, each a fresh permutation of ``length`` indices; batches run on over the epochs' borders."""

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self._cached: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int) -> Tensor:
        """[batch_size] indices of step ``step`` >= 0."""
        start, parts, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, offset = divmod(start, self.length)
            part = self._epoch(epoch)[offset : offset + missing]
            parts.append(part)
            start, missing = start + len(part), missing - len(part)
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if self._cached[0] != epoch:
            self._cached = (
                epoch,
                torch.randperm(self.length, generator=generator_for(self.seed, 1, epoch), device="cpu"),
            )
        return self._cached[1]
