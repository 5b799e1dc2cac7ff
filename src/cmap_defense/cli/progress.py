"""How far long work is: a bar on a terminal, and elsewhere, such as in a log, a line every 30 seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm
from typing_extensions import Self

EVERY = 30.0
"""Seconds between lines."""


class Progress:
    """Progress of one work unit, on standard error; a context manager, whose end removes the bar.

    Args:
        total: number of steps; 0 where the first call of ``at`` says it.
        what: what is done, such as "training".
        stream: where to write; None for standard error.
        clock: of seconds.
        watched: whether lines appear during long steps too, from a thread. Without it they appear at steps alone.
    """

    def __init__(
        self,
        total: int,
        what: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        watched: bool = True,
    ) -> None:
        self.total, self.done, self.what, self.remark = total, 0, what, ""
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._written = clock()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._bar: tqdm[Any] | None = None
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(total=total, desc=what, file=self._stream, leave=False, dynamic_ncols=True)
        elif self._stream is not None and watched:
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.close()

    def step(self, name: str = "") -> None:
        """What parts of the package call: with the name of a part as it begins, with "" for one step more."""
        if name:
            self.at(self.done, what=name)
        else:
            self.at(self.done + 1)

    def at(self, done: int, total: int | None = None, *, what: str | None = None, remark: str | None = None) -> None:
        """So many steps are done. None leaves the number of all steps, the name or the remark as it was."""
        self.done = done
        self.total = self.total if total is None else total
        self.what = self.what if what is None else what
        self.remark = self.remark if remark is None else remark
        if self._first is None and (what is None or total is not None):
            self._first = (done, self._clock())
        if self._bar is None:
            self.write_if_due()
            return
        self._bar.total = self.total
        self._bar.set_description(self.what, refresh=False)
        self._bar.set_postfix_str(self.remark, refresh=False)
        self._bar.update(done - self._bar.n)
        if what is not None:
            self._bar.refresh()

    def write_if_due(self) -> None:
        """A line when the last one is 30 seconds old."""
        with self._lock:
            now = self._clock()
            if self._stream is None or now - self._written < EVERY:
                return
            self._written = now
            self._stream.write(self._line(now) + "\n")
            self._stream.flush()

    def _line(self, now: float) -> str:
        text = f"{self.what}: {self.done} of {self.total}" if self.total else self.what
        if self._first is not None and self.done > self._first[0] and now > self._first[1]:
            each = (now - self._first[1]) / (self.done - self._first[0])
            text += f", about {_length(each * (self.total - self.done))} left"
        return f"{text}, {self.remark}" if self.remark else text

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self.write_if_due()


def _length(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
