"""Progress of long work where there is no terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmap_defense.cli import progress as module
from cmap_defense.cli.main import main
from cmap_defense.cli.progress import EVERY, Progress


class Clock:
    """Seconds that the test decides."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_progress_lines() -> None:
    """Here there are lines."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


def written(clock: Clock, total: int) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(total, "training", stream=stream, clock=clock, watched=False), stream


def test_a_line_every_thirty_seconds_says_what_how_far_and_time_left(clock: Clock) -> None:
    progress, stream = written(clock, 100)
    for step in range(1, 50):
        clock.now += 2.0
        progress.at(step, remark="loss=0.5")
    assert stream.getvalue().splitlines() == [
        "training: 15 of 100, about 3 min left, loss=0.5",
        "training: 30 of 100, about 2 min left, loss=0.5",
        "training: 45 of 100, about 2 min left, loss=0.5",
    ]


def test_short_work_writes_nothing(clock: Clock) -> None:
    progress, stream = written(clock, 2)
    clock.now += EVERY - 1
    progress.step("a part")
    progress.step()
    assert stream.getvalue() == ""


def test_parts_are_named(clock: Clock) -> None:
    progress, stream = written(clock, 3)
    clock.now += EVERY
    progress.step("purifying the clean images")
    clock.now += EVERY
    progress.step()
    clock.now += EVERY
    progress.step()
    assert stream.getvalue().splitlines() == [
        "purifying the clean images: 0 of 3",
        "purifying the clean images: 1 of 3",
        "purifying the clean images: 2 of 3, about 30 s left",
    ]


def test_work_that_is_continued_is_not_taken_for_work_that_was_done_now(clock: Clock) -> None:
    progress, stream = written(clock, 0)
    progress.at(90, 100, what="pgd, run 0")
    clock.now += 60
    progress.at(91, 100, what="pgd, run 0")
    assert stream.getvalue() == "pgd, run 0: 91 of 100, about 9 min left\n"


def test_a_long_step_is_reported_while_it_lasts(clock: Clock) -> None:
    progress, stream = written(clock, 0)
    progress.at(0, 40, what="pgd, run 0")
    for _ in range(5):
        clock.now += EVERY / 2
        progress.write_if_due()
    assert stream.getvalue().splitlines() == ["pgd, run 0: 0 of 40"] * 2


def test_hours_are_hours(clock: Clock) -> None:
    progress, stream = written(clock, 1000)
    progress.at(0)
    clock.now += 60
    progress.at(1)
    assert stream.getvalue() == "training: 1 of 1000, about 16.6 h left\n"


def test_without_a_standard_error_nothing_is_written(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(2, "training", clock=clock) as progress:
        clock.now += EVERY
        progress.step()


class Terminal(io.StringIO):
    """A stream that is shown to a person."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_progress_bar_that_is_removed(clock: Clock) -> None:
    terminal = Terminal()
    with Progress(4, "training", stream=terminal, clock=clock) as progress:
        progress.step("first part")
        progress.at(2, remark="loss=0.5")
        progress.step("second part")
    shown = terminal.getvalue()
    assert "first part:   0%|" in shown
    assert "second part:  50%|" in shown
    assert "2/4" in shown
    assert "loss=0.5" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")


MODEL = ["-b", "fashion-mnist-ct", "-c", "embedded", "-d", "embedded", "-n", "2"]
SMALL = ["--n-latents", "1", "--iterations", "2", "-o", "out"]
ATTACKED = ["--only", "transfer", "--steps", "1", "--predictions", "1", "--reevaluations", "1"]
TINY_NETWORK = ["--batch-size", "8", "--channels", "8,8", "--blocks", "1", "--attention", "none"]
COMMANDS = {
    "demo": ["--images", "2", *SMALL],
    "purify": ["image.png", "-b", "fashion-mnist-ct", *SMALL],
    "evaluate": [*MODEL, *ATTACKED, "--sanity-images", "0", "--no-search-on-clean", *SMALL],
    "study": ["vote", *MODEL, *ATTACKED, *SMALL],
    "detect": ["-n", "2", "--reference", "2", "--levels", "1", "--steps", "1", *SMALL],
    "quality": [*MODEL, "--samples", "2", *SMALL],
    "train": ["--data", "data.npz", "--images", "16", *TINY_NETWORK, "-o", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_write_lines_to_a_log_and_compute_with_the_threads_that_are_given(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)  # all lines are due at once
    monkeypatch.chdir(tmp_path)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    Image.fromarray(np.zeros((28, 28), np.uint8)).save("image.png")
    np.savez("data.npz", images=np.arange(16 * 64, dtype=np.uint8).reshape(16, 8, 8, 1))
    assert main([command, *COMMANDS[command], "--threads", "3"]) == 0
    assert 3 in threads
    assert threads[-1] == torch.get_num_threads(), "as before"
    said = capsys.readouterr().err
    assert any(" of " in line for line in said.splitlines()), said
    assert "\r" not in said
