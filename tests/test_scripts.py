"""The benchmark and the examples run, on tiny settings."""

import argparse
import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from cmap_defense.cli.main import main as command_line
from cmap_defense.errors import EvaluationError
from processes import run_script

ROOT = Path(__file__).parent.parent


def run(cwd: Path, script: str, *arguments: str, **environment: str) -> str:
    return run_script(ROOT / script, *arguments, cwd=cwd, **environment)


def test_the_benchmark_runs_and_its_loops_agree(tmp_path: Path) -> None:
    arguments = ["--images", "1", "--latents", "2", "--iterations", "2", "--repeats", "1", "--json", "figures.json"]
    more = ["--compile", "--preset", "fast", "--preset-iterations", "3"]
    printed = run(tmp_path, "benchmarks/loop.py", *arguments, *more, TORCHDYNAMO_DISABLE="1")
    assert re.search(r"^the same / ours, dtype auto and compiled: [\d.]+$", printed, re.MULTILINE)
    assert re.search(r"at K = 2, N = 3 / preset fast: [\d.]+ \([01] and [01] of 1 images right\)\n", printed)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["against_preset"]["purifier"] == "OneStep(level=0.6, n_latents=4)"
    assert "ours, dtype auto and compiled" in [row["loop"] for row in figures["rows"]]


def test_directions_are_compared(tmp_path: Path) -> None:
    sizes = ["--images", "2", "--latents", "2", "--iterations", "2", "--eot", "2", "--threads", "1"]
    chosen = ["StraightThrough()", "Unrolled(last=1, l1_smoothing=0.1)"]
    lines = run(tmp_path, "benchmarks/directions.py", *sizes, "--only", *chosen).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["direction"] for row in rows] == ["none", "random signs", "the undefended classifier's", *chosen]
    assert all(-1 <= row["alike"] <= 1 for row in rows[3:])


def test_memory_of_the_exact_gradient_is_measured(tmp_path: Path) -> None:
    sizes = ["--iterations", "4", "--images", "1", "--latents", "1", "--size", "16"]
    rows = [json.loads(line) for line in run(tmp_path, "benchmarks/unrolled_memory.py", *sizes).splitlines()]
    assert [(row["iterations"], row["checkpoint"]) for row in rows] == [(4, True), (4, False)]


def test_the_measurement_prints_a_line_per_setting(tmp_path: Path) -> None:
    arguments = ["--on", "test", "--count", "3", "--latents", "1", "2", "--iterations", "2"]
    lines = run(tmp_path, "examples/measure_fashion.py", *arguments).splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["images"] == 3
    assert [row["n_latents"] for row in rows[1:]] == [1, 2]


@pytest.mark.parametrize("on", ["test", "held-out"])
def test_a_cifar10_backbone_is_measured_with_somebody_elses_classifier(tmp_path: Path, on: str) -> None:
    images, classifier = made_up_cifar10(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"cifar10_{split}.npz").write_bytes(images.read_bytes())
    arguments = ["--on", on, "--count", "3", "--latents", "2", "--iterations", "1", "2"]
    arguments += ["--classifier", str(classifier), "--depth", "20"]
    script = "examples/measure_cifar10.py"
    lines = run(tmp_path, script, *arguments, CMAP_DEFENSE_DATA=str(tmp_path)).splitlines()
    rows = [json.loads(line) for line in lines]
    assert (rows[0]["images"], rows[0]["eps"]) == (3, 8 / 255)
    assert [row["iterations"] for row in rows[1:]] == [1, 2]


def made_up_fashion_mnist(folder: Path) -> None:
    """Noise in the format of Fashion-MNIST, with more training images than are held out."""
    (folder / "fashion-mnist").mkdir()
    rng = np.random.RandomState(0)
    for stem, count in (("train", 5064), ("t10k", 300)):
        images = np.array([2051, count, 28, 28], dtype=">i4").tobytes() + rng.bytes(count * 784)
        labels = np.array([2049, count], dtype=">i4").tobytes() + (np.arange(count) % 10).astype(np.uint8).tobytes()
        (folder / "fashion-mnist" / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (folder / "fashion-mnist" / f"{stem}-labels-idx1-ubyte").write_bytes(labels)


def test_a_purification_is_animated(tmp_path: Path) -> None:
    arguments = ["--images", "0", "3", "--every", "25", "--out", "course.gif"]
    printed = run(tmp_path, "examples/animate.py", *arguments)
    assert printed.startswith("ankle boot: attacked ")
    with Image.open(tmp_path / "course.gif") as picture:
        assert picture.n_frames == 2


def test_levels_are_chosen_and_accuracy_is_set_against_coverage(tmp_path: Path) -> None:
    made_up_fashion_mnist(tmp_path)
    levels = ["levels", "--data", "fashion-mnist", "--count", "2", "--only", "none", "--steps", "1", "--out", "runs"]
    run(tmp_path, "benchmarks/comparison.py", *levels, CMAP_DEFENSE_DATA=str(tmp_path))
    (row,) = map(json.loads, (tmp_path / "runs" / "levels.jsonl").read_text().splitlines())
    assert (row["purifier"], row["passes"]) == ("none", 0)
    changed = [*levels, "--count", "3", "--steps", "2"]
    with pytest.raises(AssertionError, match=r"other options:\n  count: 2 before, 3 now\n  steps: 1 before, 2 now"):
        run(tmp_path, "benchmarks/comparison.py", *changed, CMAP_DEFENSE_DATA=str(tmp_path))
    sizes = ["--count", "4", "--steps", "1", "--eot", "1", "--coverage", "1", "0.5"]
    printed = run(tmp_path, "examples/abstain.py", *sizes, CMAP_DEFENSE_DATA=str(tmp_path))
    assert [line.split(" ")[1] for line in printed.splitlines()[2:]] == ["1", "0.5"]


def test_differences_are_taken_image_by_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is right where the other is, and on one of four images more: a mean of 1/4, a standard error of 1/4, times
    3.182 for the three degrees of freedom."""
    same = {"model": "defended", "seed": 0, "label": 0, "predictions": [0], "one_latent": None}
    for name, extra in (("better", 1), ("worse", 0)):
        folder = tmp_path / "exact-4" / name
        folder.mkdir(parents=True)
        lines = [
            same | {"attack": attack, "image": image, "reevaluated": [0, 0] if image < 2 + extra else [1, 1]}
            for attack in ("clean", "exact-eot")
            for image in range(4)
        ]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the script appends
    differences = runpy.run_path(str(ROOT / "benchmarks" / "comparison.py"))["differences"]
    differences(argparse.Namespace(out=tmp_path, count=4, only=None))
    assert "| better | worse | +0.250 ± 0.795 | +0.250 ± 0.795 |" in capsys.readouterr().out


def test_levels_go_on_with_the_same_options_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the script appends
    attacked_images = runpy.run_path(str(ROOT / "benchmarks" / "comparison.py"))["attacked_images"]
    stored = tmp_path / "attacked.pt"
    assert attacked_images(stored, {"steps": 1}) is None
    torch.save({"made_with": {"steps": 1}, "images": {"clean": torch.zeros(2)}}, stored)
    assert attacked_images(stored, {"steps": 1}).keys() == {"clean"}
    with pytest.raises(EvaluationError, match="steps: 1 before, 2 now"):
        attacked_images(stored, {"steps": 2})


def test_the_classifiers_training_writes_its_assets(tmp_path: Path) -> None:
    made_up_fashion_mnist(tmp_path)
    script = "examples/train_fashion_classifier.py"
    run(tmp_path, script, "--out", "assets", "--epochs", "1", "--batch-size", "32", CMAP_DEFENSE_DATA=str(tmp_path))
    assert "head.weight" in load_file(tmp_path / "assets" / "classifier.safetensors")
    with np.load(tmp_path / "assets" / "test256.npz") as file:
        assert file["images"].shape == (256, 28, 28)


def test_a_third_partys_classifier_behind_a_converted_backbone_runs_from_end_to_end(tmp_path: Path) -> None:
    shared = ROOT.parent / "shared"
    data, classifier = shared / "data/cifar10_test_512.npz", shared / "classifiers/cifar10_resnet20.safetensors"
    if not (data.is_file() and classifier.is_file()):  # elsewhere: the same files, made up
        data, classifier = made_up_cifar10(tmp_path)
    arguments = ["--data", str(data), "--classifier", str(classifier), "--depth", "20", "--random-backbone", "small"]
    sizes = ["--count", "3", "--latents", "2", "--iterations", "4"]
    figures = json.loads(run(tmp_path, "examples/wrap_cifar10.py", *arguments, *sizes))
    assert (figures["images"], figures["settings"]["n_latents"]) == (3, 2)
    assert figures["objective_last"] < figures["objective_first"]
    assert 0 <= figures["purified"][1] <= figures["purified"][0] <= figures["purified"][2] <= 1


def test_a_new_last_layer_is_trained_and_loads_where_the_recipe_says(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cats", "dogs")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.randint(0, 128, (40, 50, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    recipe = "examples/recipes/imagenet100_head.py"
    sizes = ["--size", "32", "--epochs", "2", "--batch-size", "4", "--no-pretrained"]
    with pytest.raises(AssertionError, match="2 classes, not 100"):
        run(tmp_path, recipe, "--data", "images", "--out", "head", *sizes)
    with pytest.raises(AssertionError, match="the folders train and test"):
        run(tmp_path, recipe, "--data", "images/train", "--out", "head", *sizes, CLASSES="2")
    printed = run(tmp_path, recipe, "--data", "images", "--out", "head", *sizes, CLASSES="2")
    assert "test accuracy" in printed
    weights = load_file(tmp_path / "head" / "resnet50.safetensors")
    assert weights["fc.weight"].shape == (2, 2048)
    assert {"conv1.weight", "layer4.2.bn3.running_mean"} <= weights.keys()


def made_up_cifar10(folder: Path) -> tuple[Path, Path]:
    """Random images with labels, and a random ResNet-20."""
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (8, 32, 32, 3)).astype(np.uint8), rng.randint(0, 10, 8).astype(np.uint8)
    np.savez(folder / "images.npz", images=images, labels=labels)
    resnet = runpy.run_path(str(ROOT / "examples" / "cifar_resnet.py"))["CifarResNet"](20)
    save_file(resnet.state_dict(), folder / "classifier.safetensors")
    return folder / "images.npz", folder / "classifier.safetensors"


def test_busy_cores_compares_two_runs_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], *, env: dict[str, str], **_: Any) -> SimpleNamespace:
        assert "OMP_NUM_THREADS" not in env
        assert command[:3] == [sys.executable, "-m", "cmap_defense"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert command_line(command[3:]) == 0
        return SimpleNamespace(stdout=said.getvalue())

    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "busy_cores.py"))["main"]
    monkeypatch.setattr(subprocess, "run", here)
    sizes = ["--images", "1", "--iterations", "1", "--repeats", "1", "--limit", "inf"]
    said = CliRunner().invoke(benchmark, sizes, catch_exceptions=False).stdout
    assert re.search(r"^as it is: [\d.]+ s, beside [\d.]+ s, ratio [\d.]+$", said, re.MULTILINE)


def test_purifiers_are_compared(tmp_path: Path) -> None:
    given = ["--count", "2", "--steps", "1", "--eot", "1", "--only", "none", "one-step", "--out", str(tmp_path / "out")]
    text = run(tmp_path, "examples/compare_purifiers.py", *given)
    assert "| one-step | 4 |" in text
    assert (tmp_path / "out" / "comparison.svg").is_file()
