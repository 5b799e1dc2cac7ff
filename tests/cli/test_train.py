"""``cmap-defense train``: options, records that repeat all of them, time limits, pictures."""

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

from cmap_defense import PurifiedClassifier, load_backbone
from cmap_defense.backbones.folder import read_record
from cmap_defense.backbones.unet import CompactUNetConfig
from cmap_defense.cli import train as module
from cmap_defense.cli.commands import quality
from cmap_defense.cli.train import write_loss_chart
from cmap_defense.data import FolderImages, LabelledImages, open_dataset
from cmap_defense.data.subset import Subset
from cmap_defense.training import loop
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import countdown
from cmap_defense.training.objectives import ECT
from training.clock import Clock

from .conftest import Run

TINY = ["--channels", "8,8", "--blocks", "1", "--batch-size", "8", "--checkpoint-every", "16", "--precision", "float32"]
WEIGHTS = "backbone/weights.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 images 3 x 8 x 12 of two classes."""
    path = tmp_path / "data.npz"
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 12, 3)).astype(np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 2)
    return path


@pytest.fixture
def train(run: Run) -> Run:
    """Runs the command with these options."""
    return lambda *options, **status: run("train", *options, **status)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command would train, of any data set: noise of cifar10's shape for that name, else 1 x 28 x 28."""
    found: dict[str, Any] = {}

    def train_backbone(images: torch.Tensor, folder: Path, **options: Any) -> None:
        found.update(options, images=images, folder=folder)
        raise click.exceptions.Abort

    def opened(source: str, **options: Any) -> LabelledImages:
        found.update(source=source, data_options=options)
        shape = (3, 32, 32) if source == "cifar10" else (1, 28, 28)
        images = torch.randint(0, 256, (60, *shape), dtype=torch.uint8)
        return LabelledImages(images, torch.arange(60) % 3)

    monkeypatch.setattr(module, "train_backbone", train_backbone)
    monkeypatch.setattr(module, "open_dataset", opened)
    return found


def save_folder(folder: Path, classes: str, count: int, shape: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """Class folders with ``count`` images altogether, each of one colour; the first half is of the first class."""
    for number in range(count):
        place = folder / classes[len(classes) * number // count]
        place.mkdir(parents=True, exist_ok=True)
        colour = number if mode == "L" else (number, 0, 0)
        Image.new(mode, shape, colour).save(place / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize(
    ("name", "data", "held_out"),
    [("fashion-mnist-ct", "fashion-mnist", "5000"), ("cifar10-ct-small", "cifar10", "2000")],
)
def test_the_commands_of_packaged_backbones_still_mean_what_they_meant(
    tmp_path: Path, captured: dict[str, Any], run: Run, name: str, data: str, held_out: str
) -> None:
    """The records that ship: network, objective and loop, though options may be those of an older version."""
    record = load_backbone(name).record
    assert record is not None
    words = shlex.split(record.training["command"])
    assert words[:2] == ["cmap-defense", "train"]
    hold_out = words.index("--hold-out") + 1
    assert words[hold_out] == held_out
    words[hold_out] = "5"
    run(*words[1:], "-o", tmp_path / "out", status=130)  # as far as the training itself
    assert captured["source"] == data
    assert len(captured["images"]) == 55
    assert captured["network"].name == "compact"
    assert captured["network"].config == CompactUNetConfig.from_dict(record.network_config)
    settings = {key: value for key, value in record.training["objective"].items() if key != "name"}
    assert captured["objective"] == ECT.from_dict(settings)
    trained = dict(record.training["train"])
    half_lives = trained.pop("ema_half_lives", None) or trained.pop("ema_half_life")
    half_lives = half_lives if isinstance(half_lives, list) else [half_lives]
    expected = TrainingConfig(**trained, ema_half_life=half_lives, compile=True, weights="float16")
    assert captured["config"] == expected
    assert captured["seconds_left"] is None


RICH = [
    *["--class-conditional", "--objective", "ict", "--objective-set", "intervals_end=40", "--objective-set"],
    *["huber=0.02", "--network", "compact", "--preset", "cifar10", "--set", "dropout=0.25", "--set", "embedding=8"],
    *["--channels", "8,8", "--blocks", "1", "--patch", "2", "--set", "head_channels=4", "--ema-half-life", "50,20"],
    *["--learning-rate", "0.002", "--warmup-images", "16", "--clip-norm", "0.5", "--no-flip", "--batch-size", "8"],
    *["--checkpoint-every", "16", "--precision", "float32", "--weights", "bfloat16", "--name", "a rich one"],
    *["--minutes", "60", "--checkpoint-part-mb", "1", "--no-hold-images", "--no-channels-last", "--device", "cpu"],
]


def test_the_recorded_command_makes_the_same_backbone(tmp_path: Path, data: Path, train: Run, run: Run) -> None:
    """With all kinds of options, less those that say where it runs; the second training has the same record."""
    train("--data", data, "--images", 32, *RICH, "-o", tmp_path / "one")
    record = read_record(tmp_path / "one" / "backbone")
    words = shlex.split(record.training["command"])
    elsewhere = "preset minutes checkpoint-part-mb no-hold-images no-channels-last device out json"
    assert not {f"--{option}" for option in elsewhere.split()} & set(words)
    assert {"dropout=0.25", "channels=[8,8]", "attention=[false,true]", "patch=2", "intervals_end=40"} <= set(words)
    run(*words[1:], "-o", tmp_path / "two")
    for folder in ("backbone", "backbone-20"):
        for file in ("weights.safetensors", "backbone.json"):
            one, two = (tmp_path / name / folder / file for name in ("one", "two"))
            assert one.read_bytes() == two.read_bytes(), file
    assert (record.name, record.num_classes, record.weights_dtype) == ("a rich one", 2, "bfloat16")
    assert record.paper.startswith("arXiv 2310.14189")
    assert record.training["train"]["clip_norm"] == 0.5
    assert record.training["objective"]["name"] == "ict"
    assert (record.training["images"], record.training["images_seen"]) == (40, 32)


def test_a_denoiser_is_tuned_and_distilled(tmp_path: Path, data: Path, train: Run, run: Run) -> None:
    """EDM, then ECT from its weights, then CD of it as teacher, from its weights; the records name it."""
    options = ["--data", data, "--images", 16, *TINY]
    denoiser = tmp_path / "edm" / "backbone"
    train(*options, "--objective", "edm", "--name", "teacher", "-o", tmp_path / "edm")
    before = read_record(denoiser)
    assert load_backbone(denoiser).image_shape == (3, 8, 12)
    train(*options, "--from", denoiser, "-o", tmp_path / "ect")
    distil = ["--objective", "cd", "--teacher", denoiser, "--from", denoiser, "--objective-set", "levels=5"]
    train(*options, *distil, "-o", tmp_path / "cd")
    source = {"name": "teacher", "kind": "denoiser", "weights_sha256": before.weights_sha256}
    ect, cd = (read_record(tmp_path / name / "backbone") for name in ("ect", "cd"))
    assert (ect.kind, cd.kind) == ("consistency", "consistency")
    assert cd.training["teacher"] == source
    assert ect.training["from"] == cd.training["from"] == source | {"training": before.training}
    assert cd.training["objective"]["teacher"] == "teacher"
    assert f"--teacher {denoiser}" in cd.training["command"]
    error = train(*options, "-o", tmp_path / "ect", status=1)  # without --from it is another training
    assert "from: teacher before, not given now" in error
    Image.new("RGB", (12, 8)).save(tmp_path / "black.png")
    given = ["purify", tmp_path / "black.png", "-b", tmp_path / "ect" / "backbone", "-o", tmp_path / "out"]
    run(*given, "--n-latents", 1, "--iterations", 2)


@pytest.mark.parametrize(("option", "objective"), [("--teacher", "edm"), ("--from", "ect")])
def test_a_model_of_other_classes_is_refused(tmp_path: Path, train: Run, option: str, objective: str) -> None:
    """As many, in another order: every label would be wrong."""
    options = ["--class-conditional", "--images", 16, *TINY]
    first, second = (save_folder(tmp_path / classes, classes, 4, (12, 8)) for classes in ("ab", "cd"))
    train("--data", first, *options, "--objective", objective, "-o", tmp_path / "first")
    others = ["--objective", "cd"] if option == "--teacher" else []
    given = ["--data", second, *options, *others, option, tmp_path / "first" / "backbone"]
    assert "its classes are a, b, those of the data c, d" in train(*given, "-o", tmp_path / "second", status=2)
    assert not (tmp_path / "second").exists()


def test_what_is_held_out_of_a_folder_is_what_the_other_commands_take(
    tmp_path: Path, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, train: Run
) -> None:
    """And not the last class."""
    monkeypatch.setattr(module, "open_dataset", open_dataset)
    folder = save_folder(tmp_path / "images", "ab", 40, mode="L")
    train("--data", folder, "--image-channels", 1, "--hold-out", 10, "-o", tmp_path / "out", status=130)
    kept = captured["images"][:, 0, 0, 0].tolist()
    taken = Subset(count=10, order="random").indices(40)
    assert sorted([*kept, *taken]) == list(range(40))
    assert {position // 20 for position in taken} == {0, 1}


@pytest.mark.parametrize("where", ["images.npz", "cifar10"])
def test_what_is_held_out_of_other_data_is_their_last_images(
    tmp_path: Path, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, train: Run, where: str
) -> None:
    """Of a name's too, where a folder is called like it."""
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8)
    data = LabelledImages(images.clone(), torch.arange(40) // 20)
    monkeypatch.setattr(module, "open_dataset", lambda source, **options: data)
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    train("--data", where, "--hold-out", 10, "-o", tmp_path / "out", status=130)
    kept = captured["images"][:, 0, 0, 0].tolist()
    assert [*kept, *Subset(count=10, order="last").indices(40)] == list(range(40))


@pytest.mark.parametrize(
    ("mistake", "status"),
    [(["--set", "channel=[8]"], 1), (["--learning-rate", "-1"], 2), (["--from", "fashion-mnist-ct"], 1)],
)
def test_a_mistake_is_named_before_a_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Run, mistake: list[str], status: int
) -> None:
    """Whose images may take minutes: one alone is read, for its size."""
    read: list[list[int]] = []
    select = FolderImages.select

    def noted(self: FolderImages, indices: Any) -> LabelledImages:
        read.append(list(indices))
        return select(self, indices)

    monkeypatch.setattr(FolderImages, "select", noted)
    arguments = ["--data", save_folder(tmp_path / "images", "ab", 6), *TINY, "-o", tmp_path / "run"]
    train(*arguments, *mistake, status=status)
    assert read in ([], [[0]])
    assert not (tmp_path / "run").exists()
    read.clear()
    train(*arguments, "--images", "8", "--hold-out", "2")
    assert [len(indices) for indices in read] == [1, 4], "what is held out is not read"


def test_minutes_choose_a_length_that_is_kept(
    tmp_path: Path, data: Path, train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six seconds of a clock by which a step takes a quarter of one, and nothing else anything; the recorded command
    has the length."""
    clock = Clock()
    monkeypatch.setattr(module, "countdown", functools.partial(countdown, clock=clock))
    monkeypatch.setattr(Learner, "step", clock.taking(0.25, Learner.step))
    options = ["--data", data, "--minutes", 0.1, *TINY, "--checkpoint-every", 10**6, "--json", "-o", tmp_path / "run"]
    found = json.loads(train(*options))
    planned = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert found["images"] == found["images_seen"] == planned["images"] > 0
    assert found["finished"]
    assert f"--images {planned['images']} " in read_record(tmp_path / "run" / "backbone").training["command"]


def test_calls_that_stop_continue_to_the_same_weights(
    tmp_path: Path, data: Path, train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by the time, carried elsewhere, interrupted in the middle of a checkpoint; or not at all."""
    options = ["--data", data, "--images", 40, *TINY, "--checkpoint-part-mb", 1, "-o"]
    for seen in (8, 16):
        text = train(*options, tmp_path / "here", "--minutes", 1e-9)
        assert f"Stopped after {seen} of 40 images: the same command continues." in text
        assert "cmap-defense quality" not in text
        assert read_record(tmp_path / "here" / "backbone").training["images_seen"] == seen
    (tmp_path / "there").mkdir()
    for name in ("checkpoint-00000002", "log.jsonl"):
        (tmp_path / "here" / name).rename(tmp_path / "there" / name)
    assert all(path.stat().st_size <= 10**6 for path in (tmp_path / "there").rglob("*") if path.is_file())
    save = loop.save_checkpoint

    def interrupted(*arguments: Any, **given: Any) -> Any:
        save(*arguments, **given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", interrupted)
        train(*options, tmp_path / "there", status=130)
    assert "Stopped" not in train(*options, tmp_path / "there")
    train(*options, tmp_path / "straight")
    for name in (WEIGHTS, "backbone/backbone.json", "log.jsonl", "samples.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


@pytest.mark.parametrize(("rows", "places"), [([(50_000, 3.0), (100_000, 1.0)], [25_000, 75_000]), ([(8, 5.0)], [4])])
def test_the_chart_shows_each_mean_over_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, float]], places: list[float]
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": 1, "images": images, "loss": loss}) + "\n" for images, loss in rows))
    shown: dict[str, Any] = {}
    monkeypatch.setattr(module, "write_line_charts", lambda path, charts, label: shown.update(charts))
    write_loss_chart(log, tmp_path / "loss.png")
    (curves,) = shown.values()
    assert curves == {"mean loss": (places, [loss for _, loss in rows])}


def test_a_training_ends_with_its_loss_its_time_its_pictures_and_the_next_command(
    tmp_path: Path, data: Path, train: Run
) -> None:
    """The command is one that there is, with the folder of this training."""
    out = tmp_path / "a run"
    given = ["--data", data, "--images", 24, *TINY, "--checkpoint-every", 10**6, "-o", out]
    text = train(*given)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [8, 16, 24], "a short training has a curve of its loss too"
    loss = rows[-1]["loss"]
    assert re.search(rf"^Mean loss of the last steps {loss:.4g}; 24 images seen; this call took \d+ s\.$", text, re.M)
    with Image.open(out / "samples.png") as sheet:
        assert sheet.size == (8 * 25 + 1, 8 * 17 + 1)
    with Image.open(out / "loss.png") as chart:
        assert len(chart.convert("L").getcolors()) > 10
    (words,) = [shlex.split(line) for line in text.splitlines() if line.startswith("  cmap-defense ")]
    parsed = quality.make_context("quality", words[2:]).params
    assert (words[:2], parsed["backbone"]) == (["cmap-defense", "quality"], str(out / "backbone"))
    assert (parsed["data"], parsed["out"]) == (str(data), out / "quality")
    (line,) = [line for line in text.splitlines() if "PurifiedClassifier(" in line]
    made = eval(line, {"PurifiedClassifier": PurifiedClassifier, "my_classifier": torch.nn.Flatten()})
    assert made.image_shape == (3, 8, 12)
    found = json.loads(train(*given, "--json"))
    assert (found["loss"], found["next"]) == (loss, [shlex.join(words), line.strip()])
    assert found["seconds"] > 0
    assert found["loss_chart"] == str(out / "loss.png")
