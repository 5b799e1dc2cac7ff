"""Progress of long work where there is no terminal."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmap_defense.cli.main import main
from cmap_defense.common import progress as module
from cmap_defense.common.progress import Progress


@pytest.fixture(autouse=True)
def no_progress_lines() -> None:
    """Here there are lines."""


def test_a_log_has_lines_that_say_what_how_far_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was done before is not taken for work that was done now."""
    monkeypatch.setattr(module, "EVERY", 0.0)
    with Progress(0, "training") as progress:
        progress.at(90, 100, what="pgd, run 0")
        progress.at(91, 100, remark="loss=0.5")
        progress.step("purifying")
        progress.step()
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert re.fullmatch(r"pgd, run 0: 91 of 100, about .* left, loss=0\.5", lines[-2])
    assert re.fullmatch(r"purifying: 92 of 100, about .* left, loss=0\.5", lines[-1])


def test_short_work_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "training") as progress:
        progress.step("a part")
        progress.step()
    assert capsys.readouterr().err == ""


def test_without_a_standard_error_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(0, "training") as progress:
        progress.at(1, 2, what="a part")
        progress.step()


class Terminal(io.StringIO):
    """A stream that is shown to a person."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_progress_bar_that_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(4, "training") as progress:
        progress.at(2, 4, what="second part", remark="loss=0.5")
    shown = terminal.getvalue()
    assert "training:   0%|" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")


TINY_NETWORK = ["--batch-size", "8", "--channels", "8,8", "--blocks", "1", "--attention", "none"]
COMMANDS = {
    "purify": ["image.png", "-b", "fashion-mnist-ct", "--n-latents", "1", "-o", "out"],
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
