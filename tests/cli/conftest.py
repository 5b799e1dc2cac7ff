"""What holds for all tests of the command line."""

import math

import pytest

from cmap_defense.cli import progress


@pytest.fixture(autouse=True)
def no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lines of progress, which a slow machine would write."""
    monkeypatch.setattr(progress, "EVERY", math.inf)
