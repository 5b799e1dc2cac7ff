"""Progress of long work where there is no terminal."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import certified
from attack_toys import QUICK, THREATS, labelled, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD
from cmap_defense.cli.main import main
from cmap_defense.common import progress as module
from cmap_defense.common.passes import counting_passes
from cmap_defense.common.progress import Progress
from cmap_defense.errors import SettingsError
from cmap_defense.purifiers import Chain, Identity, OneStep
from toys import uniform
from training import trained


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


IMAGES = uniform(3, 3, 8, 6, seed=0)


def model(**options: Any) -> PurifiedClassifier:
    return wrapped(settings=None, max_parallel=2, **options)


WORK: dict[str, Callable[[Any, Path], Any]] = {
    "purify": lambda progress, _: wrapped(max_parallel=2).purify(IMAGES, progress=progress),
    "chain": lambda progress, _: model(purifier=Chain(OneStep(), OneStep())).purify(IMAGES, progress=progress),
    "predict": lambda progress, _: model(purifier=OneStep(n_latents=3)).predict(IMAGES, progress=progress),
    "calibrate": lambda progress, _: wrapped(max_parallel=2).calibrate(IMAGES, progress=progress),
    "certify": lambda progress, _: certified.small(progress=progress),
    "train": lambda progress, folder: trained.run(folder, progress=progress),
}


@pytest.mark.parametrize("work", WORK)
def test_a_function_is_told_how_much_is_done_of_how_much(work: str, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    WORK[work](lambda done, total: said.append((done, total)), tmp_path)
    assert len(said) > 2
    assert said == sorted(set(said)), "it goes up"
    assert {total for _, total in said} == {said[-1][0]}, "to the total"


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_bar_is_shown_where_it_is_wanted(
    work: str, wanted: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    WORK[work](wanted, tmp_path)
    assert bool(re.match(r"\r\w+: +0", terminal.getvalue())) is bool(wanted)


def test_passes_are_those_of_the_purifier_for_any_number_of_latents() -> None:
    said: list[tuple[int, int]] = []
    latents = torch.zeros(3, 5, 3, 8, 6)
    wrapped().purify(IMAGES, latents=latents, progress=lambda *now: said.append(now))
    assert said[-1] == (3 * 5 * (QUICK.iterations + 1),) * 2
    both = model(purifier=Chain(OneStep(n_latents=2), OneStep(n_latents=3)))
    with counting_passes() as passes:
        both.purify(IMAGES, progress=lambda *now: said.append(now))
    assert said[-1] == (passes.total,) * 2 == (3 * (2 + 6),) * 2
    said.clear()
    model(purifier=Identity()).purify(IMAGES, progress=lambda *now: said.append(now))
    wrapped().purify(IMAGES[:0], progress=lambda *now: said.append(now))
    assert said == [], "there is nothing to wait for"


def test_an_attack_counts_evaluations_whose_number_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[tuple[int, int | None]] = []
    attack, (images, labels) = PGD(THREATS["linf"], steps=2), labelled(3)
    result = attack(wrapped().eval(), images, labels, progress=lambda *now: said.append(now))
    assert said == [(done + 1, None) for done in range(len(said))]
    assert 2 <= len(said) <= result.queries
    monkeypatch.setattr(module, "EVERY", 0.0)
    attack(wrapped().eval(), images, labels, progress=True)
    assert f"PGD: {len(said)} done" in capsys.readouterr().err


def test_anything_else_is_refused() -> None:
    with pytest.raises(SettingsError, match="a function of"):
        wrapped().purify(IMAGES, progress="yes")  # pyright: ignore[reportArgumentType]


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
