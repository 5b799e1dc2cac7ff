"""Losses: read now and then, their means, and the file of them."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from cmap_defense.errors import TrainingError
from cmap_defense.training.loop import LINES, READ_EVERY, LossLog

CPU = torch.device("cpu")


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_on_the_cpu_every_loss_is_known_at_once(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "log.jsonl", CPU)
    assert math.isnan(log.newest)
    for value in (3.0, 1.0, 2.0):
        log.add(torch.tensor(value))
        assert log.newest == value
    assert log.means(3) == [(1, 3.0), (2, 1.0), (3, 2.0)]
    log.add(torch.tensor(7.0))
    assert log.means(4) == [(4, 7.0)]


def test_a_device_that_works_ahead_is_read_now_and_then(tmp_path: Path) -> None:
    """The first loss at once, then every fifty; the mean counts them all."""
    log = LossLog(tmp_path / "log.jsonl", CPU)
    log.every = LossLog(tmp_path, torch.device("cuda")).every
    assert log.every == READ_EVERY == 50
    known = []
    for value in range(1, 121):
        log.add(torch.tensor(float(value)))
        known.append(log.newest)
    assert known == [1.0] * 50 + [51.0] * 50 + [101.0] * 20
    means = log.means(120)
    assert math.fsum(mean for _, mean in means) / len(means) == pytest.approx(60.5)
    assert log.newest == 120.0


@pytest.mark.parametrize("count", [1, 3, LINES - 1, LINES, LINES + 1, 2 * LINES + 3, 390])
def test_the_stretches_of_a_checkpoint_are_about_equal_and_hold_each_loss_once(tmp_path: Path, count: int) -> None:
    log = LossLog(tmp_path / "log.jsonl", CPU)
    for value in range(count):
        log.add(torch.tensor(float(value)))
    means = log.means(1000 + count)
    assert len(means) == min(count, LINES)
    ends = [0, *(step - 1000 for step, _ in means)]
    assert ends[-1] == count
    sizes = [last - first for first, last in itertools.pairwise(ends)]
    assert max(sizes) - min(sizes) <= 1
    for (first, last), (_, mean) in zip(itertools.pairwise(ends), means, strict=True):
        assert mean == pytest.approx((first + last - 1) / 2)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_no_loss_is_an_error_when_it_is_read(tmp_path: Path, value: float, device: str) -> None:
    log = LossLog(tmp_path / "log.jsonl", torch.device(device))
    log.add(torch.tensor(1.0))

    def until_read() -> None:
        log.add(torch.tensor(value))
        log.add(torch.tensor(1.0))
        log.means(3)

    with pytest.raises(TrainingError, match="diverged"):
        until_read()


def test_lines_that_a_killed_run_left_behind_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LossLog(path, CPU)
    log.write(0, [(5, 9.0), (10, 5.0)], 8)
    log.write(10, [(15, 4.0), (20, 3.0)], 8)
    log.write(10, [(20, 0.25)], 8)
    assert rows(path) == [
        {"step": 5, "images": 40, "loss": 9.0},
        {"step": 10, "images": 80, "loss": 5.0},
        {"step": 20, "images": 160, "loss": 0.25},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
