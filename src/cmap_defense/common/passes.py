"""Counts network passes of backbones: one for each latent or noisy image in a call that this package makes."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator


@dataclasses.dataclass(eq=False)
class PassCounter:
    """How many passes there were, and what is called with their number."""

    total: int = 0
    on_pass: Callable[[int], None] | None = None


_active: list[PassCounter] = []  # of all threads: autograd runs a backward pass in threads of its own
_paused = threading.local()


@contextlib.contextmanager
def counting_passes(on_pass: Callable[[int], None] | None = None) -> Iterator[PassCounter]:
    """A counter of the passes in its ``with`` block; ``on_pass`` is called with their number as a call begins."""
    counter = PassCounter(on_pass=on_pass)
    _active.append(counter)
    try:
        yield counter
    finally:
        _active.remove(counter)


@contextlib.contextmanager
def not_counting() -> Iterator[None]:
    """Passes of this thread in the ``with`` block are not counted, such as those that only measure memory."""
    before, _paused.here = getattr(_paused, "here", False), True
    try:
        yield
    finally:
        _paused.here = before


def count_passes(number: int) -> None:
    """Add a call of a backbone with ``number`` latents or noisy images to all counters that are active."""
    for counter in () if getattr(_paused, "here", False) else tuple(_active):
        if counter.on_pass is not None:
            counter.on_pass(counter.total)
        counter.total += number
