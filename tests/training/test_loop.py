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

from cmap_defense.backbones import ConsistencyBackbone, EDMDenoiser, NoiseRange
from cmap_defense.errors import CheckpointError, DataError, SettingsError, TrainingError
from cmap_defense.training import checkpoint
from cmap_defense.training.budget import Budget
from cmap_defense.training.checkpoint import read_checkpoint
from cmap_defense.training.learner import learning_rate
from cmap_defense.training.loop import Trained, TrainState, train
from cmap_defense.training.objectives import CT, ECT, EDM, Batch, CTSettings, Denoise, ECTSettings, Objective
from cmap_defense.training.settings import Execution, TrainSettings
from toys import noise
from training import killed
from training.killed import NETWORK, PART, SETTINGS, fresh_backbone, result, run, training_images, training_labels


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_small_parts() -> Iterator[None]:
    """Bit for bit is promised for the same number of threads; and checkpoints in several parts, where asked for."""
    threads, megabyte = torch.get_num_threads(), checkpoint.MEGABYTE
    torch.set_num_threads(1)
    checkpoint.MEGABYTE = PART
    yield
    torch.set_num_threads(threads)
    checkpoint.MEGABYTE = megabyte


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_same_result(found: tuple[ConsistencyBackbone, Trained], expected: tuple[ConsistencyBackbone, Trained]):
    ours, theirs = result(*found), result(*expected)
    assert ours.keys() == theirs.keys()
    for part, tensors in theirs.items():
        assert_same_bits(ours[part], tensors)


def assert_same_function(found: ConsistencyBackbone, expected: ConsistencyBackbone) -> None:
    """Images from noise at several levels, up to 1e-5.

    The weights themselves are no measure: a bias in front of a normalisation has a gradient of zero but for rounding,
    and Adam makes whole steps of it.
    """
    sigma = torch.tensor([0.1, 1.0, 10.0, 80.0])
    noisy = sigma[:, None, None, None] * noise(4, 1, 8, 8, seed=1)
    with torch.no_grad():
        images, others = (model.eval().denoise(noisy, sigma) for model in (found, expected))
    torch.testing.assert_close(images, others, rtol=1e-4, atol=1e-5)


def files(folder: Path) -> dict[str, bytes]:
    """All that a training wrote."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


Straight = dict[str, tuple[Path, tuple[ConsistencyBackbone, Trained]]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Folder and outcome of trainings that nothing disturbed."""
    folders = {what: tmp_path_factory.mktemp(what) for what in ("plain", "rich")}
    return {what: (folder, run(folder, what)) for what, folder in folders.items()}


# --- killed and continued ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "what"),
    [("logged", "plain"), ("part", "rich"), ("saved", "rich")],
)
def test_killed_and_continued_it_ends_with_the_same_bits(
    straight: Straight, tmp_path: Path, where: str, what: str
) -> None:
    """Killed by SIGKILL within the second checkpoint, or right after it or its line of the log.

    Equal checkpoints are equal weights, averages, targets and moments of Adam.
    """
    command = [sys.executable, killed.__file__, str(tmp_path), where, what]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.kill()
    assert child.returncode == -9
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*[0-9]"))
    assert newest == (20 if where == "saved" else 10)
    steps: list[int] = []
    outcome = run(tmp_path, what, on_step=lambda state: steps.append(state.step))
    assert steps == list(range(newest + 1, 31))
    folder, expected = straight[what]
    assert_same_result(outcome, expected)
    assert files(tmp_path) == files(folder)


def test_a_rich_training_has_all_that_changes_in_its_checkpoints(straight: Straight) -> None:
    folder, (backbone, trained) = straight["rich"]
    saved = read_checkpoint(folder / "checkpoint-00000030")
    names = {name for name, _ in backbone.named_parameters()}
    kinds = {"weights", "ema-50", "ema-20", "target", "adam/step", "adam/exp_avg", "adam/exp_avg_sq"}
    assert saved.tensors.keys() == {f"{kind}/{name}" for kind in kinds for name in names}
    assert len(list((folder / "checkpoint-00000030").glob("part-*.safetensors"))) > 3
    for half_life, average in zip((50, 20), trained.averages, strict=True):
        assert average.half_life == half_life
        assert_same_bits(
            {name: saved.tensors[f"ema-{half_life}/{name}"] for name in names}, dict(average.weights.items())
        )


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(straight: Straight, tmp_path: Path) -> None:
    run(tmp_path)
    part = tmp_path / "checkpoint-00000030" / "part-000.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    steps: list[int] = []
    outcome = run(tmp_path, on_step=lambda state: steps.append(state.step))
    assert steps == list(range(21, 31))
    folder, expected = straight["plain"]
    assert_same_result(outcome, expected)
    assert files(tmp_path) == files(folder)


def test_a_finished_training_is_not_trained_further(straight: Straight, tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)
    again = run(tmp_path, on_step=lambda state: pytest.fail(f"step {state.step}"))
    assert again[1].finished
    assert_same_result(again, straight["plain"][1])
    assert files(tmp_path) == before


def test_how_it_is_carried_out_may_change_from_call_to_call(straight: Straight, tmp_path: Path) -> None:
    """The layout of the weights and the size of the parts; the same numbers up to rounding."""
    spent = Budget(1.0, clock=iter([0.0, *[1.0] * 12, *[100.0] * 100]).__next__)
    _, halfway = run(tmp_path, budget=spent, execution=Execution(channels_last=True))
    assert 0 < halfway.step < 30
    backbone, _ = run(tmp_path, execution=Execution(channels_last=False, part_mb=1))
    assert_same_function(backbone, straight["plain"][1][0])


def test_dropout_is_a_function_of_seed_and_step_too(tmp_path: Path) -> None:
    """Whatever state the global generator is in, and without moving it."""

    def trained(folder: Path, seed: int) -> dict[str, Tensor]:
        backbone = fresh_backbone(NETWORK.replace(dropout=0.5))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            train(backbone, training_images(), ECT(), SETTINGS.replace(images=24), folder, described={})
            assert torch.equal(torch.random.get_rng_state(), before)
        return backbone.state_dict()

    assert_same_bits(trained(tmp_path / "a", 1), trained(tmp_path / "b", 2))


# --- a budget ---------------------------------------------------------------------------------------------------------


def test_a_spent_budget_stops_with_a_checkpoint_and_the_next_call_goes_on(straight: Straight, tmp_path: Path) -> None:
    """A clock that ticks a second with every look; half a minute each."""
    checkpoints: list[int] = []
    steps: list[int] = []
    calls = 0
    finished = False
    while not finished:
        seconds = iter(range(10**6))
        budget = Budget(0.2, clock=lambda seconds=seconds: float(next(seconds)))
        outcome = run(
            tmp_path,
            budget=budget,
            on_step=lambda state: steps.append(state.step),
            on_checkpoint=checkpoints.append,
        )
        calls, finished = calls + 1, outcome[1].finished
        assert outcome[1].step == steps[-1] == checkpoints[-1]
        assert (tmp_path / f"checkpoint-{steps[-1]:08d}").is_dir()
    assert calls == 3
    assert steps == list(range(1, 31))
    assert checkpoints == [10, 12, 20, 24, 30]
    assert_same_result(outcome, straight["plain"][1])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps, "up to 20 lines a checkpoint"


def test_even_a_budget_that_is_spent_makes_a_step(tmp_path: Path) -> None:
    _, trained = run(tmp_path, budget=Budget(1.0, clock=iter([0.0, 61.0]).__next__))
    assert (trained.step, trained.steps, trained.finished) == (1, 30, False)


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
    _, losses = train_tiny(tmp_path, SETTINGS.replace(images=50 * 8, precision=precision), objective)
    assert len(losses) == 50
    assert sum(losses[-15:]) < 0.7 * sum(losses[:15])


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_network_alone_runs_in_the_precision(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """Weights, gradients, averages and losses stay in float32, and so does what is added up along the network."""
    seen: dict[str, set[torch.dtype]] = {"branches": set(), "sums": set()}
    backbone, losses = fresh_backbone(), []
    for name, module in backbone.network.named_modules():
        if isinstance(module, nn.Conv2d):
            role = "sums" if name in ("enter", "leave") or name.endswith("skip") else "branches"
            module.register_forward_hook(lambda _, inputs, output, role=role: seen[role].add(output.dtype))

    class Watching(ECT):
        def losses(self, *arguments: Any) -> Tensor:
            losses.append(super().losses(*arguments))
            return losses[-1]

    settings = SETTINGS.replace(images=24, precision=precision)
    (ema,) = train(backbone, training_images(), Watching(), settings, tmp_path, described={}).averages
    assert seen == {"branches": {dtype}, "sums": {torch.float32}}
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in backbone.parameters() if p.grad is not None} == {torch.float32}
    assert {average.dtype for average in ema.weights.values()} == {torch.float32}


def test_the_log_holds_the_mean_losses_between_checkpoints(tmp_path: Path) -> None:
    _, losses = train_tiny(tmp_path, SETTINGS.replace(images=27 * 8))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in rows] == [(step, 8 * step) for step in range(1, 28)]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-12)


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


def test_at_a_checkpoint_the_backbone_holds_the_first_averages_in_eval_mode(tmp_path: Path) -> None:
    backbone = fresh_backbone()
    seen: list[dict[str, Tensor]] = []

    def on_checkpoint(step: int) -> None:
        assert not backbone.training
        seen.append({name: p.detach().clone() for name, p in backbone.named_parameters()})

    settings = SETTINGS.replace(ema_half_lives=(50, 7))
    trained = train(backbone, training_images(), ECT(), settings, tmp_path, described={}, on_checkpoint=on_checkpoint)
    first, second = (average.weights for average in trained.averages)
    assert_same_bits(seen[-1], first)
    saved = read_checkpoint(tmp_path / "checkpoint-00000030").tensors
    assert_same_bits({name: saved[f"ema-50/{name}"] for name in first}, first)
    assert_same_bits({name: saved[f"ema-7/{name}"] for name in first}, second)
    assert_same_bits(backbone.state_dict(), {name: saved[f"weights/{name}"] for name in first})
    assert any(not torch.equal(p, first[name]) for name, p in backbone.named_parameters())
    assert any(not torch.equal(second[name], first[name]) for name in first)


def test_a_failing_checkpoint_hook_leaves_the_weights_of_the_training(tmp_path: Path) -> None:
    backbone = fresh_backbone()

    def on_checkpoint(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(backbone, training_images(), ECT(), SETTINGS, tmp_path, described={}, on_checkpoint=on_checkpoint)
    saved = read_checkpoint(tmp_path / "checkpoint-00000010").tensors
    assert_same_bits(backbone.state_dict(), {name: saved[f"weights/{name}"] for name in backbone.state_dict()})
    assert backbone.training


def test_the_target_is_the_model_itself_or_an_average_that_follows_it(tmp_path: Path) -> None:
    """The average by its recursion in float64, with the decay of each step; it has no gradients, and is in the same
    mode."""
    backbone = fresh_backbone()
    weights: list[Tensor] = []
    targets: list[Tensor] = []
    progress: list[float] = []

    class Watching(CT):
        def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
            followed = target.func.__self__  # pyright: ignore[reportFunctionMemberAccess] - a bound partial
            assert followed is not backbone
            assert followed.training
            assert not any(p.requires_grad for p in followed.parameters())
            weights.append(backbone.network.enter.weight.detach().clone())
            targets.append(followed.network.enter.weight.detach().clone())
            progress.append(batch.progress)
            return super().losses(model, batch, noise, target)

    objective = Watching(CTSettings(decay_start=0.8))
    train(backbone, training_images(), objective, SETTINGS, tmp_path, described={})
    expected = weights[0].double()
    for before, own, found in zip(progress, weights[1:], targets[1:], strict=False):
        mu = objective.target_decay(before)
        expected = mu * expected + (1 - mu) * own.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights[-1], targets[-1])

    class Plain(ECT):
        def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
            assert target.func.__self__ is model.func.__self__  # pyright: ignore[reportFunctionMemberAccess]
            return super().losses(model, batch, noise, target)

    train_tiny(tmp_path / "plain", SETTINGS.replace(images=16), Plain())


def test_a_denoiser_learns_what_a_denoiser_learns(tmp_path: Path) -> None:
    denoiser = EDMDenoiser(fresh_backbone().network, (1, 8, 8))
    losses: list[float] = []
    settings = SETTINGS.replace(images=40 * 8)
    options = {"described": {}, "on_step": lambda state: losses.append(state.loss)}
    train(denoiser, training_images(), EDM(), settings, tmp_path, **options)
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_labels_reach_the_network_with_their_images(tmp_path: Path) -> None:
    """The bright half is the label; each image is asked about with its own, by the model and by its target."""
    backbone = fresh_backbone(NETWORK.replace(num_classes=2))
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(CT):
        def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
            left, right = batch.images[..., :4].mean(dim=(1, 2, 3)), batch.images[..., 4:].mean(dim=(1, 2, 3))
            told = [batch.labels, *(denoise.keywords["class_labels"] for denoise in (model, target))]  # pyright: ignore
            seen.extend(((right > left).long(), labels) for labels in told)
            return super().losses(model, batch, noise, target)

    settings = SETTINGS.replace(flip=False, images=80)
    train(backbone, training_images(), Watching(), settings, tmp_path, described={}, labels=training_labels())
    assert len(seen) == 30
    for bright, labels in seen:
        assert torch.equal(bright, labels)
    assert backbone.network.classes.weight.abs().max() > 0


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


@pytest.mark.parametrize(
    ("classes", "labels", "said"),
    [
        (None, torch.zeros(50, dtype=torch.int64), "takes no labels"),
        (2, None, "needs labels"),
        (2, torch.zeros(49, dtype=torch.int64), r"int64 \[50\]"),
        (2, torch.zeros(50), "int64"),
        (2, torch.arange(50) % 3, "from 0 to 2, but the model has 2"),
        (2, torch.arange(50) % 2 - 1, "from -1"),
    ],
)
def test_wrong_labels_are_refused(tmp_path: Path, classes: int | None, labels: Tensor | None, said: str) -> None:
    backbone = fresh_backbone(NETWORK.replace(num_classes=classes))
    with pytest.raises(DataError, match=said):
        train(backbone, training_images(), ECT(), SETTINGS, tmp_path / "t", described={}, labels=labels)
    assert not (tmp_path / "t").exists()


def test_the_objective_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'edm' trains a EDMDenoiser, but this is a ConsistencyBackbone"):
        train(fresh_backbone(), training_images(), EDM(), SETTINGS, tmp_path / "t", described={})
    assert not (tmp_path / "t").exists()


def test_a_training_that_diverges_stops_and_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    class Diverging(ECT):
        def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
            found = super().losses(model, batch, noise, target)
            return found * math.inf if batch.progress > 0.5 else found

    with pytest.raises(TrainingError, match="diverged"):
        train_tiny(tmp_path, SETTINGS, Diverging())
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-00000010"]


def test_a_gradient_that_is_no_number_stops_a_training_too(tmp_path: Path) -> None:
    """Whose losses are finite: the root of zero."""

    class Rootless(ECT):
        def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
            found = super().losses(model, batch, noise, target)
            return found + (0 * found).sqrt() if batch.progress > 0.3 else found

    with pytest.raises(TrainingError, match="diverged"):
        train_tiny(tmp_path, SETTINGS, Rootless())
    assert not list(tmp_path.glob("checkpoint-*20"))


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    train_tiny(tmp_path, SETTINGS.replace(images=80))
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"batch_size: 8 before, 4 now"):
        train_tiny(tmp_path, SETTINGS.replace(images=80, batch_size=4))
    assert files(tmp_path) == before
