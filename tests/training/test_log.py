"""Losses: read now and then, their means, and the file of them."""

import json
import math
from pathlib import Path

import pytest
import torch

from cmap_defense.errors import TrainingError
from cmap_defense.training.log import READ_EVERY, LossLog

CPU = torch.device("cpu")


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_on_the_cpu_every_loss_is_known_at_once(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "log.jsonl", CPU)
    assert math.isnan(log.newest)
    for value in (3.0, 1.0, 2.0):
        log.add(torch.tensor(value))
        assert log.newest == value
    assert log.mean() == 2.0
    log.add(torch.tensor(7.0))
    assert log.mean() == 7.0


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
    assert log.mean() == pytest.approx(60.5)
    assert log.newest == 120.0


def test_a_loss_keeps_no_graph(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "log.jsonl", torch.device("cuda"))
    weight = torch.ones(3, requires_grad=True)
    log.add(weight.sum())
    log.add(weight.sum())
    assert not log._unread[0].requires_grad


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_no_loss_is_an_error_when_it_is_read(tmp_path: Path, value: float, device: str) -> None:
    log = LossLog(tmp_path / "log.jsonl", torch.device(device))
    log.add(torch.tensor(1.0))

    def until_read() -> None:
        log.add(torch.tensor(value))
        log.add(torch.tensor(1.0))
        log.mean()

    with pytest.raises(TrainingError, match="diverged"):
        until_read()


def test_lines_that_a_killed_run_left_behind_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LossLog(path, CPU)
    for step in (10, 20, 30):
        log.write(step, 8 * step, step / 2)
    log.write(20, 160, 0.25)
    assert rows(path) == [
        {"step": 10, "images": 80, "loss": 5.0},
        {"step": 20, "images": 160, "loss": 0.25},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
