"""``cmap-defense train``: options, records that say all of it again, time budgets, pictures."""

from __future__ import annotations

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
from cmap_defense.cli import train_data
from cmap_defense.cli.commands.quality import quality
from cmap_defense.cli.commands.train import train
from cmap_defense.cli.main import main
from cmap_defense.cli.train import loss_chart
from cmap_defense.data import FolderImages, LabelledImages, Subset, open_dataset
from cmap_defense.training.budget import Budget
from cmap_defense.data import FolderImages, LabelledImages, open_dataset
from cmap_defense.evaluation.protocol import Subset
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import countdown
from cmap_defense.training.objectives import ECT
from training.clock import Clock

TINY = ["--channels", "8,8", "--blocks", "1", "--batch-size", "8", "--checkpoint-every", "16", "--precision", "float32"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 images 3 x 8 x 12 of two classes."""
    path = tmp_path / "data.npz"
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 12, 3)).astype(np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 2)
    return path


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
    monkeypatch.setattr(train_data, "open_dataset", opened)
    return found


def run(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "held_out"),
    [("fashion-mnist-ct", "fashion-mnist", "5000"), ("cifar10-ct-small", "cifar10", "2000")],
)
def test_the_commands_of_packaged_backbones_still_mean_what_they_meant(
    tmp_path: Path, captured: dict[str, Any], name: str, data: str, held_out: str
) -> None:
    """The records that ship: network, objective and loop, though options may be those of an older version."""
    record = load_backbone(name).record
    assert record is not None
    words = shlex.split(record.training["command"])
    assert words[:2] == ["cmap-defense", "train"]
    hold_out = words.index("--hold-out") + 1
    assert words[hold_out] == held_out
    words[hold_out] = "5"
    assert main([*words[1:], "-o", str(tmp_path / "out")]) == 130, "as far as the training itself"
    assert captured["source"] == data
    assert len(captured["images"]) == 55
    assert captured["network"].name == "compact"
    assert captured["network"].config == CompactUNetConfig.from_dict(record.network_config)
    assert isinstance(captured["objective"], ECT)
    settings = {key: value for key, value in record.training["objective"].items() if key != "name"}
    assert captured["objective"] == ECT.from_dict(settings)
    loop = dict(record.training["train"])
    half_lives = loop.pop("ema_half_lives", None) or [loop.pop("ema_half_life")]
    expected = TrainingConfig(**loop, ema_half_life=half_lives, compile=True, weights="float16")
    assert captured["config"] == expected
    assert captured["seconds_left"] is None


RICH = [
    *["--class-conditional", "--objective", "ict", "--objective-set", "intervals_end=40", "--objective-set"],
    *["huber=0.02", "--network", "compact", "--preset", "cifar10", "--set", "dropout=0.25", "--set", "embedding=8"],
    *["--channels", "8,8", "--blocks", "1", "--patch", "2", "--set", "head_channels=4", "--ema-half-life", "50,20"],
    *["--learning-rate", "0.002", "--warmup-images", "16", "--clip-norm", "0.5", "--no-flip", "--batch-size", "8"],
    *["--checkpoint-every", "16", "--precision", "float32", "--weights", "bfloat16", "--name", "a rich one"],
]


def test_the_recorded_command_makes_the_same_backbone(tmp_path: Path, data: Path) -> None:
    """With all kinds of options; the record's own command is that of the second training too."""
    assert run("--data", data, "--images", 32, *RICH, "-o", tmp_path / "one") == 0
    record = read_record(tmp_path / "one" / "backbone")
    words = shlex.split(record.training["command"])
    assert "--preset" not in words
    assert {"dropout=0.25", "channels=[8,8]", "attention=[false,true]", "patch=2", "intervals_end=40"} <= set(words)
    assert main([*words[1:], "-o", str(tmp_path / "two")]) == 0
    for folder in ("backbone", "backbone-20"):
        for file in ("weights.safetensors", "backbone.json"):
            one, two = (tmp_path / run / folder / file for run in ("one", "two"))
            assert one.read_bytes() == two.read_bytes(), file
    assert record.num_classes == 2
    assert record.paper.startswith("arXiv 2310.14189")
    assert record.training["train"]["clip_norm"] == 0.5
    assert record.training["objective"]["name"] == "ict"


def test_where_a_training_runs_is_not_in_its_command(tmp_path: Path, data: Path) -> None:
    given = ["--minutes", 60, "--checkpoint-part-mb", 1, "--no-hold-images", "--no-channels-last", "--device", "cpu"]
    assert run("--data", data, "--images", 16, *TINY, *given, "-o", tmp_path / "run") == 0
    command = read_record(tmp_path / "run" / "backbone").training["command"]
    for option in ("minutes", "part-mb", "hold-images", "channels-last", "--device", "--out"):
        assert option not in command
    assert "--images 16" in command


# --- objectives, networks, other weights ------------------------------------------------------------------------------


def test_a_denoiser_is_tuned_and_distilled(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EDM, then ECT from its weights, then CD of it as teacher, from its weights; the records name it."""
    options = ["--data", data, "--images", 16, *TINY]
    denoiser = tmp_path / "edm" / "backbone"
    assert run(*options, "--objective", "edm", "--name", "teacher", "-o", tmp_path / "edm") == 0
    before = read_record(denoiser)
    assert load_backbone(denoiser).image_shape == (3, 8, 12)
    assert run(*options, "--from", denoiser, "-o", tmp_path / "ect") == 0
    distil = ["--objective", "cd", "--teacher", denoiser, "--from", denoiser, "--objective-set", "levels=5"]
    assert run(*options, *distil, "-o", tmp_path / "cd") == 0
    source = {"name": "teacher", "kind": "denoiser", "weights_sha256": before.weights_sha256}
    ect, cd = (read_record(tmp_path / name / "backbone") for name in ("ect", "cd"))
    assert (ect.kind, cd.kind) == ("consistency", "consistency")
    assert cd.training["teacher"] == source
    assert ect.training["from"] == cd.training["from"] == source | {"training": before.training}
    assert cd.training["objective"]["teacher"] == "teacher"
    assert f"--teacher {denoiser}" in cd.training["command"]
    capsys.readouterr()
    assert run(*options, "-o", tmp_path / "ect") == 1, "without --from it is another training"
    assert "from: teacher before, not given now" in capsys.readouterr().err


def test_a_class_conditional_denoiser_is_distilled_class_by_class(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a network that is told the classes too, and knows as many."""
    options = ["--data", data, "--images", 16, *TINY]
    denoiser = tmp_path / "edm" / "backbone"
    assert run(*options, "--class-conditional", "--objective", "edm", "-o", tmp_path / "edm") == 0
    distil = ["--objective", "cd", "--teacher", denoiser, "--objective-set", "levels=5"]
    assert run(*options, "--class-conditional", *distil, "-o", tmp_path / "cd") == 0
    assert load_backbone(tmp_path / "cd" / "backbone").num_classes == 2
    assert run(*options, *distil, "-o", tmp_path / "other") == 2
    assert "add --class-conditional" in capsys.readouterr().err
    images = np.zeros((9, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "three.npz", images=images, labels=np.arange(9) % 3)
    assert run(*options, "--data", tmp_path / "three.npz", "--class-conditional", *distil, "-o", tmp_path / "o") == 2
    assert "it knows 2 classes, not 3" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--teacher", "--from"])
def test_a_model_that_was_told_other_classes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """As many, in another order: every label would be wrong."""
    for names in ("ab", "ba"):
        for number, name in enumerate(names):
            place = tmp_path / names / f"{number}{name}" if names == "ba" else tmp_path / names / name
            place.mkdir(parents=True)
            Image.new("RGB", (12, 8), (80 * number, 0, 0)).save(place / "0.png")
    options = ["--class-conditional", "--images", 16, *TINY]
    objective = "edm" if option == "--teacher" else "ect"
    assert run("--data", tmp_path / "ab", *options, "--objective", objective, "-o", tmp_path / "first") == 0
    others = ["--objective", "cd"] if option == "--teacher" else []
    given = ["--data", tmp_path / "ba", *options, *others, option, tmp_path / "first" / "backbone"]
    assert run(*given, "-o", tmp_path / "second") == 2
    assert "its classes are a, b, those of the data 0b, 1a" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "second").exists()


def test_a_published_network_by_name(tmp_path: Path, data: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (20, 8, 8)).astype(np.uint8)
    np.savez(data, images=images)
    options = ["--network", "ncsnpp", "--set", "nf=8", "--set", "ch_mult=[1,2]", "--set", "num_res_blocks=1"]
    loop = ["--batch-size", 8, "--images", 8, "--precision", "float32", "-o", tmp_path / "run"]
    assert run("--data", data, *options, "--set", "attn_resolutions=[4]", *loop) == 0
    record = read_record(tmp_path / "run" / "backbone")
    assert (record.network, record.image_shape) == ("ncsnpp", (1, 8, 8))
    assert record.network_config["ch_mult"] == [1, 2]


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("ants", "bees", "cats")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for picture in range(4):
            Image.new("RGB", (20 + picture, 16), (80 * number, 0, 40)).save(
                tmp_path / "pictures" / name / f"{picture}.png"
            )
    given = ["--size", 8, "--image-channels", 1, "--class-conditional", "--images", 8]
    assert run("--data", tmp_path / "pictures", *given, *TINY, "-o", tmp_path / "run") == 0
    record = read_record(tmp_path / "run" / "backbone")
    assert (record.image_shape, record.num_classes) == ((1, 8, 8), 3)
    assert record.training["class_names"] == ["ants", "bees", "cats"]
    assert "--size 8 --image-channels 1 --class-conditional" in record.training["command"]


def test_what_is_held_out_of_a_folder_is_what_the_other_commands_look_at(
    tmp_path: Path, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the last class."""
    monkeypatch.setattr(train_data, "open_dataset", open_dataset)
    for number in range(40):
        place = tmp_path / "images" / "ab"[number // 20]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(place / f"{number:02d}.png")
    given = ["--data", tmp_path / "images", "--image-channels", 1, "--hold-out", 10]
    assert run(*given, "-o", tmp_path / "out") == 130
    kept = captured["images"][:, 0, 0, 0].tolist()
    looked_at = Subset(count=10, order="random").indices(40)
    assert sorted([*kept, *looked_at]) == list(range(40))
    assert {position // 20 for position in looked_at} == {0, 1}


@pytest.mark.parametrize("where", ["images.npz", "cifar10"])
def test_what_is_held_out_of_other_data_is_their_last_images(
    tmp_path: Path, captured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Of a name's too, where a folder lies that is called like it."""
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8)
    data = LabelledImages(images.clone(), torch.arange(40) // 20)
    monkeypatch.setattr(train_data, "open_dataset", lambda source, **options: data)
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run("--data", where, "--hold-out", 10, "-o", tmp_path / "out") == 130
    kept = captured["images"][:, 0, 0, 0].tolist()
    assert [*kept, *Subset(count=10, order="last").indices(40)] == list(range(40))


@pytest.mark.parametrize(
    "mistake", [["--set", "channel=[8]"], ["--learning-rate", "-1"], ["--from", "fashion-mnist-ct"]]
)
def test_a_mistake_is_named_before_a_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: list[str]
) -> None:
    """Whose images may take minutes: one alone is looked at, for its size."""
    for number in range(6):
        place = tmp_path / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number}.png")
    read: list[list[int]] = []
    select = FolderImages.select

    def noted(self: FolderImages, indices: Any) -> LabelledImages:
        read.append(list(indices))
        return select(self, indices)

    monkeypatch.setattr(FolderImages, "select", noted)
    arguments = ["--data", tmp_path / "images", *TINY, "-o", tmp_path / "run"]
    assert run(*arguments, *mistake) == 1
    assert read in ([], [[0]])
    assert not (tmp_path / "run").exists()
    read.clear()
    assert run(*arguments, "--images", "8", "--hold-out", "2") == 0
    assert [len(indices) for indices in read] == [1, 4], "what is held out is not read"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--objective", "cd"], 2, "--teacher"),
        (["--teacher", "somewhere"], 2, "--teacher"),
        (["--objective", "cd", "--teacher", "fashion-mnist-ct"], 2, "a denoiser is needed"),
        (["--objective", "ict", "--halvings", "3"], 2, "--halvings"),
        (["--halvings", "3", "--objective-set", "halvings=3"], 2, "--halvings"),
        (["--objective-set", "huber"], 2, "key=value"),
        (["--objective-set", "huber=big"], 1, "ECT.huber must be a number, but is 'big'"),
        (["--objective-set", "hubber=1"], 1, "Did you mean 'huber'"),
        (["--objective", "dpm"], 2, "dpm"),
        (["--network", "unet"], 2, "unet"),
        (["--set", "dropout=0.1", "--set", "dropout=0.2"], 2, "dropout is set twice"),
        (["--set", "num_classes=3"], 1, "num_classes of the network compact is that of the data"),
        (["--set", "channel=[8]"], 1, "Did you mean 'channels'"),
        (["--network", "ncsnpp", "--channels", "8,8"], 2, "--channels belongs to the compact network"),
        (["--network", "ncsnpp", "--preset", "cifar10"], 2, "--preset belongs"),
        (["--channels", "8,8", "--attention", "2"], 2, "no level 2 of 2"),
        (["--preset", "cifar10", "--attention", "3"], 2, "no level 3 of 3"),
        (["--minutes", "0"], 2, "--minutes"),
        (["--ema-half-life", "5,5"], 1, "ema_half_life must differ"),
        (["--size", "16"], 1, "only images of a folder are resized"),
        (["--hold-out", "40"], 1, "leaves nothing"),
        (["--from", "fashion-mnist-ct"], 1, "another network"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
) -> None:
    assert run("--data", data, *arguments, "-o", tmp_path / "run") == status
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_labels_of_one_class_are_no_condition(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(data, images=np.zeros((4, 8, 12, 3), dtype=np.uint8))
    assert run("--data", data, "--class-conditional", "-o", tmp_path / "run") == 1
    assert "no labels of several classes" in capsys.readouterr().err


# --- a budget ---------------------------------------------------------------------------------------------------------


def test_minutes_choose_a_length_that_is_kept(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six seconds of a clock by which a step takes a quarter of one, and nothing else anything; the command that is
    recorded says what they came to."""
    clock = Clock()
    monkeypatch.setattr(module, "countdown", functools.partial(countdown, clock=clock))
    monkeypatch.setattr(Learner, "step", clock.taking(0.25, Learner.step))
    options = ["--data", data, "--minutes", 0.1, *TINY, "--checkpoint-every", 10**6, "--json", "-o", tmp_path / "run"]
    assert run(*options) == 0
    answer = json.loads(capsys.readouterr().out)
    planned = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert answer["images"] == planned["images"] > 0
    assert answer["finished"]
    assert answer["images_seen"] == planned["images"]
    assert f"--images {planned['images']} " in read_record(tmp_path / "run" / "backbone").training["command"]


def test_a_call_that_stops_says_how_to_go_on(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget of next to nothing makes one step a call, and the calls make the training."""
    options = ["--data", data, "--images", 24, *TINY, "-o"]
    budget = [*options, tmp_path / "run", "--minutes", 1e-9]
    for seen in (8, 16):
        assert run(*budget) == 0
        assert f"Stopped after {seen} of 24 images: the same command continues." in capsys.readouterr().out
        assert read_record(tmp_path / "run" / "backbone").training["images_seen"] == seen
    assert run(*budget) == 0
    assert "Stopped" not in capsys.readouterr().out
    assert run(*options, tmp_path / "straight") == 0
    one, other = (tmp_path / name / "backbone" / "weights.safetensors" for name in ("run", "straight"))
    assert one.read_bytes() == other.read_bytes()


def test_a_training_is_carried_on_elsewhere_from_its_checkpoint_and_log(tmp_path: Path, data: Path) -> None:
    options = ["--data", data, "--images", 24, *TINY, "--checkpoint-part-mb", 1, "-o"]
    assert run(*options, tmp_path / "here", "--minutes", 1e-9) == 0
    (tmp_path / "there").mkdir()
    for name in ("checkpoint-00000001", "log.jsonl"):
        (tmp_path / "here" / name).rename(tmp_path / "there" / name)
    assert all(path.stat().st_size <= 10**6 for path in (tmp_path / "there").rglob("*") if path.is_file())
    assert run(*options, tmp_path / "there") == 0
    assert run(*options, tmp_path / "straight") == 0
    for name in ("backbone/weights.safetensors", "samples.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_training_draws_its_loss_and_its_samples(tmp_path: Path, data: Path) -> None:
    assert run("--data", data, "--images", 48, *TINY, "-o", tmp_path / "run") == 0
    with Image.open(tmp_path / "run" / "samples.png") as sheet:
        assert sheet.size == (8 * 25 + 1, 8 * 17 + 1)
    with Image.open(tmp_path / "run" / "loss.png") as chart:
        assert len(chart.convert("L").getcolors()) > 10


@pytest.mark.parametrize(
    ("rows", "places", "label"),
    [
        ([(50_000, 3.0), (100_000, 1.0)], [25, 75], "images seen, in units of 1,000"),
        ([(3, 3.0), (4, 1.0)], [1.5, 3.5], "images seen"),
        ([(2500, 2.0), (2501, 4.0)], [125, 250.05], "images seen, in units of 10"),
        ([(8, 5.0)], [4], "images seen"),
    ],
)
def test_the_chart_shows_each_mean_over_the_images_that_it_is_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[int, float]],
    places: list[float],
    label: str,
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": 1, "images": images, "loss": loss}) + "\n" for images, loss in rows))
    shown: dict[str, Any] = {}
    monkeypatch.setattr(module, "chart_row", lambda charts, **options: shown.update(charts=charts, **options))
    loss_chart(log)
    ((curve,),) = shown["charts"].values()
    assert curve.points() == [(place, loss) for place, (_, loss) in zip(places, rows, strict=True)]
    assert shown["x_label"] == label


def test_a_short_training_has_a_curve_of_its_loss(tmp_path: Path, data: Path) -> None:
    """Three steps and one checkpoint are three points, not one."""
    assert run("--data", data, "--images", 24, *TINY, "--checkpoint-every", 10**6, "-o", tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [8, 16, 24]
    assert len({row["loss"] for row in rows}) == 3


# --- what comes next --------------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[list[str]]:
    """The command lines that a training ends with, in words."""
    return [shlex.split(line) for line in text.splitlines() if line.startswith("  cmap-defense ")]


def test_a_training_ends_with_its_loss_its_time_and_the_next_command(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is one that there is, with the folder of this training."""
    out = tmp_path / "a run"
    given = ["--data", data, "--images", 16, *TINY, "-o", out]
    assert run(*given) == 0
    text = capsys.readouterr().out
    loss = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert re.search(rf"^Mean loss of the last steps {loss:.4g}; 16 images seen; this call took \d+ s\.$", text, re.M)
    (words,) = commands_of(text)
    parsed = quality.make_context("quality", words[2:]).params
    assert (words[:2], parsed["backbone"]) == (["cmap-defense", "quality"], str(out / "backbone"))
    assert (parsed["data"], parsed["out"]) == (str(data), out / "quality")
    (line,) = [line for line in text.splitlines() if "PurifiedClassifier(" in line]
    made = eval(line, {"PurifiedClassifier": PurifiedClassifier, "my_classifier": torch.nn.Flatten()})
    assert made.image_shape == (3, 8, 12)
    assert run(*given, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["loss"], answer["next"]) == (loss, [shlex.join(words), line.strip()])
    assert answer["seconds"] > 0


def test_a_training_that_is_not_done_names_no_next_command(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--data", data, "--images", 24, *TINY, "--minutes", 1e-9, "-o", tmp_path / "run") == 0
    text = capsys.readouterr().out
    assert commands_of(text) == []
    assert "the same command continues" in text


def test_what_comes_after_a_denoiser_is_its_distillation(tmp_path: Path) -> None:
    options = {"data": "cifar10", "size": None, "objective": "edm"}
    (line,) = module.next_commands(tmp_path / "run", options)
    parsed = train.make_context("train", shlex.split(line)[2:]).params
    assert (parsed["objective"], parsed["teacher"]) == ("cd", str(tmp_path / "run" / "backbone"))
    assert parsed["out"] == tmp_path / "run-distilled"


def test_the_embedded_classifier_is_for_fashion_mnist(tmp_path: Path) -> None:
    for data, classifier in (("fashion-mnist", "embedded"), ("images/", "my_models.py:classifier")):
        options = {"data": data, "size": 28, "objective": "ect"}
        parsed = quality.make_context("quality", shlex.split(module.next_commands(tmp_path, options)[0])[2:]).params
        assert (parsed["classifier"], parsed["data"], parsed["size"]) == (classifier, data, 28)
