"""A time budget: when a call has to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

from cmap_defense.settings import require_number

__all__ = ["Budget"]


class Budget:
    """The minutes that a call may take, from now on.

    Args:
        minutes: above 0.
        clock: seconds that only grow; another than the machine's for tests.

    Raises:
        SettingsError: minutes is no number above 0.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes = require_number("Budget", "minutes", minutes, above=0.0)
        self.clock = clock
        self._end = clock() + 60 * self.minutes

    @property
    def left(self) -> float:
        """Seconds, below 0 when they are over."""
        return self._end - self.clock()
