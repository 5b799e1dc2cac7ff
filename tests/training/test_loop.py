"""The training loop: it learns, it can be killed anywhere and continued to the same bits, it refuses what misfits."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmap_defense.backbones import CompactUNet, ConsistencyBackbone, NoiseRange
from cmap_defense.errors import CheckpointError, DataError
from cmap_defense.training.loop import TrainState, learning_rate, train
from cmap_defense.training.objectives import ECT, Batch, Denoise, ECTSettings, Objective
from cmap_defense.training.settings import TrainSettings
from training import killed
from training.killed import NETWORK, SETTINGS, fresh_backbone, run, training_images


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit for bit is promised for the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def process(folder: Path, where: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, killed.__file__, str(folder), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def result(folder: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / "result.pt", weights_only=True)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed, made in a process of its own."""
    folder = tmp_path_factory.mktemp("straight")
    with process(folder, "never") as child:
        child.communicate()
    assert child.returncode == 0
    return folder


# --- killed and continued ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["step", "save", "saved", "logged"])
def test_killed_and_continued_it_ends_with_the_same_bits(straight: Path, tmp_path: Path, where: str) -> None:
    """Killed by SIGKILL after step 17, halfway through the second checkpoint, or right after it or the log."""
    with process(tmp_path, where) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.kill()
    assert child.returncode == -9
    assert not (tmp_path / "result.pt").exists()

    newest = max(int(path.stem.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*.pt"))
    assert newest in ((20,) if where == "saved" else (10, 20) if where == "logged" else (10,))
    steps: list[int] = []
    backbone, ema = run(tmp_path, on_step=lambda state: steps.append(state.step))
    assert steps == list(range(newest + 1, 31))
    assert_same_bits(ema.weights, result(straight)["ema"])
    assert_same_bits(backbone.state_dict(), result(straight)["weights"])
    assert (tmp_path / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {path.name for path in straight.iterdir()} - {"result.pt"}
    )


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(straight: Path, tmp_path: Path) -> None:
    run(tmp_path)
    newest = tmp_path / "checkpoint-00000030.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    steps: list[int] = []
    backbone, ema = run(tmp_path, on_step=lambda state: steps.append(state.step))
    assert steps == list(range(21, 31))
    assert_same_bits(ema.weights, result(straight)["ema"])
    assert_same_bits(backbone.state_dict(), result(straight)["weights"])
    assert (tmp_path / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()


def test_a_finished_training_is_not_trained_further(tmp_path: Path) -> None:
    backbone, ema = run(tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    again, averages = run(tmp_path, on_step=lambda state: pytest.fail(f"step {state.step}"))
    assert_same_bits(again.state_dict(), backbone.state_dict())
    assert_same_bits(averages.weights, ema.weights)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_dropout_is_a_function_of_seed_and_step_too(tmp_path: Path) -> None:
    """Whatever state the global generator is in, and without moving it."""

    def trained(folder: Path, seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = ConsistencyBackbone(CompactUNet(NETWORK.replace(dropout=0.5)), NETWORK.image_shape)
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            train(backbone, training_images(), ECT(), SETTINGS.replace(images=24), folder, described={})
            assert torch.equal(torch.random.get_rng_state(), before)
        return backbone.state_dict()

    assert_same_bits(trained(tmp_path / "a", 1), trained(tmp_path / "b", 2))


# --- what it does -----------------------------------------------------------------------------------------------------


def train_tiny(
    folder: Path, settings: TrainSettings, objective: Objective | None = None
) -> tuple[ConsistencyBackbone, list[float]]:
    """The tiny network and its losses, step by step."""
    backbone, losses = fresh_backbone(), []
    train(
        backbone,
        training_images(),
        objective or ECT(ECTSettings(halvings=0)),
        settings,
        folder,
        described={},
        on_step=lambda state: losses.append(state.loss),
    )
    return backbone, losses


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls(tmp_path: Path, precision: str) -> None:
    """On the objective of stage 0, a denoiser's, which is the same throughout; at noise that hides the images."""
    objective = ECT(ECTSettings(halvings=0, sigma_mean=1.0, sigma_std=0.5))
    _, losses = train_tiny(tmp_path, SETTINGS.replace(images=80 * 8, precision=precision), objective)
    assert len(losses) == 80
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_network_alone_runs_in_the_precision(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """Weights, gradients, averages and losses stay in float32."""
    seen: set[torch.dtype] = set()
    backbone, losses = fresh_backbone(), []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))

    class Watching(ECT):
        def losses(self, *arguments: Any) -> Tensor:
            losses.append(super().losses(*arguments))
            return losses[-1]

    settings = SETTINGS.replace(images=24, precision=precision)
    ema = train(backbone, training_images(), Watching(), settings, tmp_path, described={})
    assert seen == {dtype}
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in backbone.parameters() if p.grad is not None} == {torch.float32}
    assert {average.dtype for average in ema.weights.values()} == {torch.float32}


def test_the_log_holds_the_mean_losses_between_checkpoints(tmp_path: Path) -> None:
    _, losses = train_tiny(tmp_path, SETTINGS.replace(images=27 * 8))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in rows] == [(10, 80), (20, 160), (27, 216)]
    for row, part in zip(rows, (losses[:10], losses[10:20], losses[20:]), strict=True):
        assert row["loss"] == pytest.approx(math.fsum(part) / len(part), rel=1e-12)


def test_hooks_see_every_step_and_every_checkpoint(tmp_path: Path) -> None:
    states: list[TrainState] = []
    checkpoints: list[int] = []
    train(
        fresh_backbone(),
        training_images(),
        ECT(),
        SETTINGS,
        tmp_path,
        described={},
        on_step=states.append,
        on_checkpoint=checkpoints.append,
    )
    assert [(state.step, state.steps) for state in states] == [(step, 30) for step in range(1, 31)]
    assert checkpoints == [10, 20, 30]


def test_at_a_checkpoint_the_backbone_holds_the_averages_in_eval_mode(tmp_path: Path) -> None:
    backbone = fresh_backbone()
    seen: list[dict[str, Tensor]] = []

    def on_checkpoint(step: int) -> None:
        assert not backbone.training
        seen.append({name: p.detach().clone() for name, p in backbone.named_parameters()})

    ema = train(backbone, training_images(), ECT(), SETTINGS, tmp_path, described={}, on_checkpoint=on_checkpoint)
    assert_same_bits(seen[-1], ema.weights)
    saved = torch.load(tmp_path / "checkpoint-00000030.pt", weights_only=True)
    assert_same_bits(saved["ema"], ema.weights)
    assert_same_bits(backbone.state_dict(), saved["weights"])
    assert any(not torch.equal(p, ema.weights[name]) for name, p in backbone.named_parameters())


def test_a_failing_checkpoint_hook_leaves_the_weights_of_the_training(tmp_path: Path) -> None:
    backbone = fresh_backbone()

    def on_checkpoint(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(backbone, training_images(), ECT(), SETTINGS, tmp_path, described={}, on_checkpoint=on_checkpoint)
    saved = torch.load(tmp_path / "checkpoint-00000010.pt", weights_only=True)
    assert_same_bits(backbone.state_dict(), saved["weights"])
    assert backbone.training


@pytest.mark.parametrize("flip", [True, False])
def test_images_reach_the_objective_in_their_range_and_about_half_of_them_mirrored(tmp_path: Path, flip: bool) -> None:
    """The first column counts the rows from 0 to 255, the others are dark; a mirrored image has it at the right."""
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., 0] = torch.tensor([0, 36, 73, 109, 146, 182, 219, 255], dtype=torch.uint8)
    batches: list[Tensor] = []

    class Watching(ECT):
        def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
            batches.append(batch.images)
            return model(batch.images, torch.ones(len(batch.images))).square().flatten(1).sum(dim=1)

    train(fresh_backbone(), image, Watching(), SETTINGS.replace(flip=flip), tmp_path, described={})
    seen = torch.cat(batches)
    assert seen.shape == (240, 1, 8, 8)
    assert (seen.min().item(), seen.max().item()) == (-1.0, 1.0)
    column = image[0, 0, :, 0] / 127.5 - 1
    as_it_is = (seen[:, 0, :, 0] == column).all(dim=1)
    mirrored = (seen[:, 0, :, 7] == column).all(dim=1)
    assert (as_it_is ^ mirrored).all()
    assert 90 < mirrored.sum() < 150 if flip else not mirrored.any()


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    train_tiny(tmp_path, SETTINGS.replace(images=16))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_learning_rate_rises_then_falls_along_a_half_cosine() -> None:
    settings = TrainSettings(images=100_000, batch_size=100, warmup_images=1000, learning_rate=0.5)
    assert learning_rate(settings, 0) == pytest.approx(0.5 * 0.1)
    assert learning_rate(settings, 400) == pytest.approx(0.5 * 0.5, rel=1e-4)
    assert learning_rate(settings, 50_000) == pytest.approx(0.25)
    assert learning_rate(settings, 100_000) == pytest.approx(0.0, abs=1e-12)
    rates = [learning_rate(settings, seen) for seen in range(1000, 100_001, 100)]
    assert rates == sorted(rates, reverse=True)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(5, 1, 8, 8),
        torch.zeros(5, 8, 8, dtype=torch.uint8),
        torch.zeros(5, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(5, 1, 8, 16, dtype=torch.uint8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
    ],
    ids=["float", "rank", "channels", "size", "empty"],
)
def test_wrong_images_are_refused_before_anything_is_written(tmp_path: Path, wrong: Tensor) -> None:
    folder = tmp_path / "training"
    with pytest.raises(DataError, match=r"uint8 \[N, 1, 8, 8\]|empty"):
        train(fresh_backbone(), wrong, ECT(), SETTINGS, folder, described={})
    assert not folder.exists()


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    train_tiny(tmp_path, SETTINGS.replace(images=80))
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"train\.batch_size: 8 there, 4 here"):
        train_tiny(tmp_path, SETTINGS.replace(images=80, batch_size=4))
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before
