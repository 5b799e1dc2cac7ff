"""What all tests of the command line use."""

import math
from collections.abc import Callable

import pytest

from cmap_defense.cli.main import main
from cmap_defense.common import progress

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine would write them."""
    monkeypatch.setattr(progress, "EVERY", math.inf)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line, checks its exit status, and returns what it printed: of a failure the error on one line."""

    def run(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        found = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert found == status, captured.err
        assert "Traceback" not in captured.err
        if not status:
            return captured.out
        assert sum(line.startswith("Error: ") for line in captured.err.splitlines()) == (status != 130)
        return " ".join(captured.err.split())

    return run
