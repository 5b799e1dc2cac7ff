"""How far long work is: a bar on a terminal, and elsewhere, such as in a log, a line every 30 seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from typing_extensions import Self

EVERY = 30.0
"""Seconds between lines."""

LINE = "{desc}{n_fmt} of {total_fmt}, about {remaining} left{postfix}\n"


class Progress:
    """Progress on standard error; its end removes the bar. A total of 0 is one that the first ``at`` says. One that is
    not ``shown``, as on other ranks than the first, does nothing."""

    def __init__(self, total: int, what: str, *, shown: bool = True) -> None:
        options: dict[str, Any] = {"mininterval": EVERY, "miniters": 1, "delay": EVERY, "bar_format": LINE}
        if sys.stderr is None or sys.stderr.isatty():
            options = {"dynamic_ncols": True}
        desc = f"{what}: "
        nowhere = sys.stderr is None or not shown
        self._bar = tqdm(total=total, desc=desc, file=sys.stderr, leave=False, disable=nowhere, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, name: str = "") -> None:
        """What parts of the package call: with the name of a part as it begins, with "" for one step more."""
        if name:
            self._bar.set_description(name, refresh=False)
        self._bar.update(not name)

    def at(self, done: int, total: int | None = None, *, what: str | None = None, remark: str = "") -> None:
        """So many steps of all are done; None leaves their number as it was."""
        if self._bar.disable:
            return
        if not self._bar.total:  # what was done before counts for no time
            self._bar.initial = self._bar.n = done
        self._bar.total = self._bar.total if total is None else total
        self._bar.set_description(what or self._bar.desc.removesuffix(": "), refresh=False)
        self._bar.set_postfix_str(remark, refresh=False)
        self._bar.update(done - self._bar.n)
