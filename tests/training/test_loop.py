"""The training loop: it learns, it can be killed anywhere and continued to the same bits, it refuses what misfits."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmap_defense.errors import CheckpointWarning, DataError, TrainingError
from cmap_defense.training import checkpoint, loop
from cmap_defense.training.checkpoint import read_checkpoint
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.learner import Learner, learning_rate
from cmap_defense.training.loop import LOG_FILE, TrainState, countdown, read_log, train
from cmap_defense.training.objectives import CT, ECT, EDM, Objective
from toys import noise
from training.trained import CONFIG, NETWORK, PART, learner, run, training_labels


@pytest.fixture(autouse=True, scope="module")
def _small_parts() -> Iterator[None]:
    """Checkpoints in several parts, where the training says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "MEGABYTE", PART)
        yield


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def files(folder: Path) -> dict[str, bytes]:
    """All that a training wrote."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses_of(folder: Path, objective: Objective | None = None, **options: Any) -> list[float]:
    """The losses of a training, step by step."""
    losses: list[float] = []
    train(learner(objective, **options), folder, on_step=lambda state: losses.append(state.loss))
    return losses


Straight = dict[str, tuple[Path, Learner]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Folder and learner of trainings that nothing disturbed."""
    folders = {what: tmp_path_factory.mktemp(what) for what in ("plain", "rich")}
    return {what: (folder, run(folder, what)[0]) for what, folder in folders.items()}


def assert_as_straight(found: Learner, folder: Path, expected: tuple[Path, Learner]) -> None:
    """The same weights, averages, target and moments of Adam, and the same files."""
    assert_same_bits(found.tensors(), expected[1].tensors())
    assert files(folder) == files(expected[0])


class Killed(BaseException):
    """The process is gone."""


def kill_at(where: str, patch: pytest.MonkeyPatch) -> None:
    """Let a training end at a place of its second checkpoint."""
    owner, name = {"saved": (loop, "save_checkpoint"), "logged": (loop.LossLog, "write")}.get(
        where, (checkpoint, "write_safetensors")
    )
    function, calls = getattr(owner, name), []

    def half(tensors: dict[str, Tensor], path: Path) -> None:
        function(tensors, path)
        if path.parent.name == "checkpoint-00000008.partial" and any("adam/step" in name for name in tensors):
            os.truncate(path, path.stat().st_size // 2)
            raise Killed

    def second_call(*arguments: Any, **options: Any) -> Any:
        calls.append(function(*arguments, **options))
        if len(calls) == 2:
            raise Killed
        return calls[-1]

    patch.setattr(owner, name, half if where == "part" else second_call)


KILLED = {"part": "rich", "saved": "rich", "logged": "plain"}
"""Place of the kill -> training: when half of a part of the second checkpoint is written, after the whole checkpoint,
or after its lines of the log."""


@pytest.mark.parametrize(("where", "what"), KILLED.items())
def test_killed_and_continued_it_ends_with_the_same_bits(
    straight: Straight, tmp_path: Path, where: str, what: str
) -> None:
    folder, steps = tmp_path / where, []
    with pytest.MonkeyPatch.context() as patch:
        kill_at(where, patch)
        with pytest.raises(Killed):
            run(folder, what)
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*[0-9]"))
    assert newest == (8 if where == "saved" else 4)
    found, _ = run(folder, what, on_step=lambda state: steps.append(state.step))
    assert steps == list(range(newest + 1, 13))
    assert_as_straight(found, folder, straight[what])


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(straight: Straight, tmp_path: Path) -> None:
    """And a finished training is not trained further."""
    run(tmp_path)
    again, step = run(tmp_path, on_step=lambda state: pytest.fail(f"step {state.step}"))
    assert step == 12
    assert_as_straight(again, tmp_path, straight["plain"])
    part = tmp_path / "checkpoint-00000012" / "part-000.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    steps: list[int] = []
    with pytest.warns(CheckpointWarning, match="goes on from checkpoint-00000008"):
        found, _ = run(tmp_path, on_step=lambda state: steps.append(state.step))
    assert steps == list(range(9, 13))
    assert_as_straight(found, tmp_path, straight["plain"])


@pytest.mark.parametrize("kept", [0, 30, -20])
def test_a_damaged_log_stops_no_training(straight: Straight, tmp_path: Path, kept: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at("saved", patch)
        with pytest.raises(Killed):
            run(tmp_path, "plain")
    log = tmp_path / LOG_FILE
    log.write_bytes(log.read_bytes()[:kept])
    _, step = run(tmp_path)
    assert step == 12
    assert read_log(log)[-1]["step"] == 12
    log.unlink()
    assert read_log(log) == []


def test_how_it_is_carried_out_may_change_from_call_to_call(straight: Straight, tmp_path: Path) -> None:
    """The layout of the weights and the size of the parts; the same images from noise at several levels.

    The weights themselves are no measure: a bias in front of a normalisation has a gradient of zero but for rounding,
    and Adam makes whole steps of it.
    """
    spent = countdown(1.0, clock=iter([0.0, *[1.0] * 5, *[100.0] * 100]).__next__)
    _, halfway = run(tmp_path, changes={"channels_last": True}, seconds_left=spent)
    assert halfway == 6
    found, _ = run(tmp_path, changes={"channels_last": False, "checkpoint_part_mb": 1})
    sigma = torch.tensor([0.1, 1.0, 10.0, 80.0])
    noisy = sigma[:, None, None, None] * noise(4, 1, 8, 8, seed=1)
    with torch.no_grad():
        images, others = (made.model.denoise(noisy, sigma) for made in (found, straight["plain"][1]))
    torch.testing.assert_close(images, others, rtol=1e-4, atol=1e-5)


def test_when_the_time_is_over_it_stops_with_a_checkpoint_and_the_next_call_continues(
    straight: Straight, tmp_path: Path
) -> None:
    """A clock that ticks a second with every reading, five of them for each call."""
    checkpoints: list[int] = []
    steps: list[int] = []
    calls, step = 0, 0
    while step < 12:
        seconds = iter(range(10**6))
        found, step = run(
            tmp_path,
            seconds_left=countdown(5 / 60, clock=lambda seconds=seconds: float(next(seconds))),
            on_step=lambda state: steps.append(state.step),
            on_checkpoint=checkpoints.append,
        )
        calls += 1
        assert step == steps[-1] == checkpoints[-1]
        assert (tmp_path / f"checkpoint-{step:08d}").is_dir()
    assert calls == 3
    assert steps == list(range(1, 13))
    assert checkpoints == [4, 5, 8, 10, 12]
    assert_same_bits(found.tensors(), straight["plain"][1].tensors())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps, "up to 20 lines a checkpoint"


@pytest.mark.parametrize(
    ("objective", "precision"),
    [
        (ECT(halvings=0, sigma_mean=1.0, sigma_std=0.5), "float32"),
        (ECT(halvings=0, sigma_mean=1.0, sigma_std=0.5), "bfloat16"),
        (EDM(), "float32"),
    ],
)
def test_the_loss_falls(tmp_path: Path, objective: Objective, precision: str) -> None:
    """On objectives that are the same throughout; ECT at noise that hides the images."""
    losses = losses_of(tmp_path, objective, config=CONFIG.replace(images=40 * 8, precision=precision))
    assert len(losses) == 40
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


class Watching(CT):
    """CT that calls ``watch`` with the arguments of each call of its loss."""

    watch: Callable[..., None]

    def losses(self, *arguments: Any) -> Tensor:
        found = super().losses(*arguments)
        self.watch(*arguments, found)
        return found


def watching(watch: Callable[..., None], **settings: Any) -> Watching:
    objective = Watching(**settings)
    object.__setattr__(objective, "watch", watch)
    return objective


def test_hooks_and_the_log_have_every_step_and_every_checkpoint(tmp_path: Path) -> None:
    states: list[TrainState] = []
    checkpoints: list[int] = []
    train(learner(), tmp_path, on_step=states.append, on_checkpoint=checkpoints.append)
    assert [(state.step, state.steps) for state in states] == [(step, 12) for step in range(1, 13)]
    assert checkpoints == [4, 8, 12]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in rows] == [(step, 8 * step) for step in range(1, 13)]
    assert [row["loss"] for row in rows] == pytest.approx([state.loss for state in states], rel=1e-12)


def test_at_a_checkpoint_the_backbone_holds_the_first_averages_in_eval_mode(tmp_path: Path) -> None:
    made, seen = learner(config=CONFIG.replace(ema_half_life=(50, 2))), []

    def on_checkpoint(step: int) -> None:
        assert not made.model.training
        seen.append({name: p.detach().clone() for name, p in made.model.named_parameters()})

    train(made, tmp_path, on_checkpoint=on_checkpoint)
    first, second = (average.weights for average in made.averages)
    assert_same_bits(seen[-1], first)
    saved = read_checkpoint(tmp_path / "checkpoint-00000012").tensors
    assert_same_bits({name: saved[f"ema-2/{name}"] for name in first}, second)
    assert_same_bits(made.model.state_dict(), {name: saved[f"weights/{name}"] for name in first})
    assert any(not torch.equal(p, first[name]) for name, p in made.model.named_parameters())
    assert any(not torch.equal(second[name], first[name]) for name in first)


def test_a_target_that_is_an_average_follows_the_model(tmp_path: Path) -> None:
    """By its recursion in float64, with the decay of each step; it has no gradients, and is in the same mode."""
    seen: list[tuple[Tensor, Tensor, float]] = []

    def watch(model: Any, batch: Any, noise: Any, target: Any, losses: Tensor) -> None:
        own, followed = (denoise.func.__self__ for denoise in (model, target))
        assert followed is not own
        assert followed.training
        assert not any(p.requires_grad for p in followed.parameters())
        seen.append((*(m.network.enter.weight.detach().clone() for m in (own, followed)), batch.progress))

    objective = watching(watch, decay_start=0.8)
    train(learner(objective), tmp_path)
    expected = seen[0][0].double()
    for (_, _, before), (own, found, _) in itertools.pairwise(seen):
        mu = objective.decay_at(before)
        expected = mu * expected + (1 - mu) * own.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(seen[-1][0], seen[-1][1])


def test_labels_reach_the_network_with_their_images(tmp_path: Path) -> None:
    """The bright half is the label; model and target have it for each image."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(model: Any, batch: Any, noise: Any, target: Any, losses: Tensor) -> None:
        left, right = batch.images[..., :4].mean(dim=(1, 2, 3)), batch.images[..., 4:].mean(dim=(1, 2, 3))
        given = [batch.labels, model.keywords["class_labels"], target.keywords["class_labels"]]
        seen.extend(((right > left).long(), labels) for labels in given)

    made = learner(watching(watch), CONFIG.replace(flip=False), NETWORK.replace(num_classes=2))
    train(made, tmp_path)
    assert len(seen) == 3 * 12
    assert all(torch.equal(bright, labels) for bright, labels in seen)
    assert made.model.network.classes.weight.abs().max() > 0


def test_the_learning_rate_rises_then_falls_along_a_half_cosine() -> None:
    config = TrainingConfig(images=100_000, batch_size=100, warmup_images=1000, learning_rate=0.5)
    expected = {0: 0.5 * 0.1, 400: 0.5 * 0.5, 50_000: 0.25, 100_000: 0.0}
    assert {seen: learning_rate(config, seen) for seen in expected} == pytest.approx(expected, rel=1e-4, abs=1e-12)
    rates = [learning_rate(config, seen) for seen in range(1000, 100_001, 100)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("network", "data", "message"),
    [
        (NETWORK, {"images": torch.zeros(5, 1, 8, 8)}, r"uint8 \[N, 1, 8, 8\]"),
        (NETWORK, {"images": torch.zeros(5, 8, 8, dtype=torch.uint8)}, r"uint8 \[N, 1, 8, 8\]"),
        (NETWORK, {"images": torch.zeros(5, 3, 8, 8, dtype=torch.uint8)}, r"uint8 \[N, 1, 8, 8\]"),
        (NETWORK, {"images": torch.zeros(5, 1, 8, 16, dtype=torch.uint8)}, r"uint8 \[N, 1, 8, 8\]"),
        (NETWORK, {"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "empty"),
        (NETWORK, {"labels": training_labels()}, "takes no labels"),
        (NETWORK.replace(num_classes=2), {"labels": None}, "needs labels"),
        (NETWORK.replace(num_classes=2), {"labels": torch.zeros(49, dtype=torch.int64)}, r"int64 \[50\]"),
        (NETWORK.replace(num_classes=2), {"labels": torch.zeros(50)}, "int64"),
        (NETWORK.replace(num_classes=2), {"labels": torch.arange(50) % 3}, "from 0 to 2, but the model has 2"),
        (NETWORK.replace(num_classes=2), {"labels": torch.arange(50) % 2 - 1}, "from -1"),
    ],
)
def test_wrong_images_and_labels_are_refused(network: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        learner(network=network, **data)


@pytest.mark.parametrize("spoilt", [lambda found: found * math.inf, lambda found: found + (0 * found).sqrt()])
def test_a_training_that_diverges_stops_and_keeps_its_last_checkpoint(
    tmp_path: Path, spoilt: Callable[[Tensor], Tensor]
) -> None:
    """An infinite loss, or a finite one with a gradient that is no number: the root of zero."""

    class Diverging(ECT):
        def losses(self, model: Any, batch: Any, noise: Any, target: Any) -> Tensor:
            found = super().losses(model, batch, noise, target)
            return spoilt(found) if batch.progress > 0.5 else found

    with pytest.raises(TrainingError, match="diverged"):
        losses_of(tmp_path, Diverging())
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-00000004"]
