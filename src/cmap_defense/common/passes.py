"""Counts network passes of backbones: one for each latent or noisy image in a call that this package makes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(eq=False)
class PassCounter:
    """How many passes there were."""

    total: int = 0


_active: list[PassCounter] = []  # of all threads: autograd runs a backward pass in threads of its own


@contextlib.contextmanager
def counting_passes() -> Iterator[PassCounter]:
    """A counter of the passes in its ``with`` block."""
    counter = PassCounter()
    _active.append(counter)
    try:
        yield counter
    finally:
        _active.remove(counter)


@contextlib.contextmanager
def not_counting() -> Iterator[None]:
    """Passes in the ``with`` block are not counted, such as those that only measure memory."""
    counters = _active[:]
    _active.clear()
    try:
        yield
    finally:
        _active.extend(counters)


def count_passes(number: int) -> None:
    """Add a call of a backbone with ``number`` latents or noisy images to all counters that are active."""
    for counter in _active:
        counter.total += number
