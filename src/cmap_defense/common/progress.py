"""How far long work is: a bar on a terminal, and elsewhere, such as in a log, a line every 30 seconds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm
from typing_extensions import Self

from cmap_defense.common.passes import counting_passes
from cmap_defense.errors import SettingsError

EVERY = 30.0
"""Seconds between lines."""

LINE = "{desc}: {n_fmt} of {total_fmt}, about {remaining} left{postfix}\n"
COUNT = "{desc}: {n_fmt} done{postfix}\n"
"""Where nobody knows the total."""

OnProgress = Callable[[int, Any], None] | bool | None
"""What ``progress=`` takes, wherever there is one. True: a bar on standard error, removed at its end; in a log a line
every 30 seconds. A function: called with how much is done and how much there is in all, ``progress(done, total)``.
None or False: neither."""


class Progress:
    """Progress of some work, reported to whom ``wanted`` says; a bar is removed at the end.

    A total of 0 is one that the first ``at`` says, None one that nobody knows. There is no bar where it is not
    ``shown``, as on other ranks than the first.
    """

    def __init__(self, total: int | None, what: str, *, wanted: OnProgress = True, shown: bool = True) -> None:
        if not (wanted is None or isinstance(wanted, bool) or callable(wanted)):
            raise SettingsError(
                "progress must be True for a bar on standard error, a function of (done, total), or None for neither, "
                f"but is {wanted!r}."
            )
        self._callback = wanted if callable(wanted) else None
        self._now = 0, total
        options: dict[str, Any] = {"mininterval": EVERY, "miniters": 1, "delay": EVERY}
        options["bar_format"] = COUNT if total is None else LINE
        if sys.stderr is not None and sys.stderr.isatty():
            options = {"dynamic_ncols": True}
        self._bar = None
        if wanted is True and sys.stderr is not None and shown:
            self._bar = tqdm(total=total, desc=what, file=sys.stderr, leave=False, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, name: str = "") -> None:
        """What parts of the package call: with the name of a part as it begins, with "" for one step more."""
        self.at(self._now[0] + (not name), what=name or None)

    def at(self, done: int, total: int | None = None, *, what: str | None = None, remark: str | None = None) -> None:
        """So many steps of all are done; None leaves the rest as it was."""
        before, self._now = self._now, (done, self._now[1] if total is None else total)
        if self._callback is not None and before != self._now:
            self._callback(*self._now)
        if self._bar is None:
            return
        if self._bar.total == 0:  # what was done before counts for no time
            self._bar.initial = self._bar.n = done
        self._bar.total = self._now[1]
        if what is not None:
            self._bar.set_description_str(what, refresh=False)
        if remark is not None:
            self._bar.set_postfix_str(remark, refresh=False)
        self._bar.update(done - self._bar.n)


@contextlib.contextmanager
def showing_passes(total: int, what: str, wanted: OnProgress = True) -> Iterator[None]:
    """The network passes in the ``with`` block as progress; there are ``total`` of them at most."""
    if wanted is None or wanted is False:
        yield
        return
    with Progress(total, what, wanted=wanted) as shown:
        with counting_passes(lambda done: shown.at(min(done, total))):
            yield
        shown.at(total)
