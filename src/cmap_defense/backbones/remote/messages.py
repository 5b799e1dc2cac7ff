"""What is said to the person who waits."""

from __future__ import annotations

import sys

__all__ = ["tell"]


def tell(message: str) -> None:
    """A line on standard error, where there is one: only before and during what takes long, such as a download."""
    if sys.stderr is not None:
        print(f"cmap-defense: {message}", file=sys.stderr, flush=True)
