"""Messages to the person who waits."""

from __future__ import annotations

import sys


def announce(message: str) -> None:
    """Print a line on standard error, where there is one: only around what takes long, such as a download."""
    if sys.stderr is not None:
        print(f"cmap-defense: {message}", file=sys.stderr, flush=True)
