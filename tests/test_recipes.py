"""The recipes run, for a few steps on made-up images: their options exist, and a part continues after another one."""

import json
import os
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from cmap_defense.cli.main import main
from patience import HANGS

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
TINY = ["--channels", "8,16", "--blocks", "1", "--batch-size", "16", "--checkpoint-every", "16"]

Recipe = Callable[..., None]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Runs a recipe with arguments and environment variables. Its calls of ``cmap-defense``, and those by way of
    torchrun, are noted and then carried out in this process, with nothing compiled."""
    calls, programs = tmp_path / "calls", tmp_path / "programs"
    programs.mkdir()
    for name in ("cmap-defense", "torchrun"):
        (programs / name).write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' {name} \"$@\" . >> '{calls}'\n")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "TORCHDYNAMO_DISABLE": "1", "CMAP_DEFENSE_DATA": str(tmp_path), "DEVICE": "cpu"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str, **environment: str) -> None:
        calls.write_text("")
        command = ["bash", str(RECIPES / name), *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=HANGS)
        assert done.returncode == 0, done.stdout + done.stderr
        for call in calls.read_text().split("\0.\0")[:-1]:
            program, *words = call.split("\0")
            if program == "torchrun":
                assert words[:3] == ["--nproc-per-node=1", "-m", "cmap_defense"]
                words = words[3:]
            assert main(words) == 0

    return run


def record(folder: Path) -> dict:
    return json.loads((folder / "backbone" / "backbone.json").read_text())


def test_fashion_mnist(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "fashion-mnist").mkdir()
    rng = np.random.RandomState(0)
    for stem, count in (("train", 5040), ("t10k", 8)):
        images = np.array([2051, count, 28, 28], dtype=">i4").tobytes() + rng.bytes(count * 784)
        labels = np.array([2049, count], dtype=">i4").tobytes() + (np.arange(count) % 10).astype(np.uint8).tobytes()
        (tmp_path / "fashion-mnist" / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / "fashion-mnist" / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    recipe("fashion-mnist.sh", "--images", "16", *TINY)
    assert record(tmp_path / "runs/fashion-mnist")["training"]["objective"]["name"] == "ect"


def test_cifar10_in_its_parts(recipe: Recipe, tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    for split, count in (("train", 5040), ("test", 24)):
        images, labels = rng.randint(0, 256, (count, 32, 32, 3)), np.arange(count) % 10
        np.savez(tmp_path / f"cifar10_{split}.npz", images=images.astype(np.uint8), labels=labels.astype(np.uint8))
    small = [*TINY, "--attention", "none"]
    recipe("cifar10.sh", "teacher", "--images", "16", *small)
    assert record(tmp_path / "runs/cifar10/teacher")["kind"] == "denoiser"
    recipe("cifar10.sh", "model", *small, IMAGES="16")
    made = record(tmp_path / "runs/cifar10/model")
    assert (made["kind"], made["name"]) == ("consistency", "my-cifar10")
    sizes = ["-n", "4", "--n-latents", "1", "--iterations", "1", "--samples", "8"]
    with pytest.raises(AssertionError, match="RESNET56"):
        recipe("cifar10.sh", "quality", *sizes)
    classifiers = {name: str(random_resnet(tmp_path, int(name[6:]))) for name in ("RESNET20", "RESNET56")}
    recipe("cifar10.sh", "quality", *sizes, **classifiers)
    assert record(tmp_path / "runs/cifar10/model")["figures"]["measured"]


def test_a_training_is_carried_in_files(recipe: Recipe, tmp_path: Path) -> None:
    content = np.random.RandomState(0).bytes(20_000_000)
    (tmp_path / "runs/cifar10/model/backbone").mkdir(parents=True)
    (tmp_path / "runs/cifar10/model/backbone/weights.safetensors").write_bytes(content)
    recipe("cifar10.sh", "pack")
    parts = sorted((tmp_path / "runs").glob("cifar10.part-*"))
    assert len(parts) == 2
    assert max(part.stat().st_size for part in parts) <= 16 * 10**6
    shutil.rmtree(tmp_path / "runs/cifar10")
    recipe("cifar10.sh", "unpack")
    assert (tmp_path / "runs/cifar10/model/backbone/weights.safetensors").read_bytes() == content


def random_resnet(folder: Path, depth: int) -> Path:
    """Weights of a classifier that knows nothing."""
    resnet = runpy.run_path(str(RECIPES.parent / "cifar_resnet.py"))["CifarResNet"](depth)
    save_file(resnet.state_dict(), folder / f"{depth}.safetensors")
    return folder / f"{depth}.safetensors"


def test_imagenet100(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    rng = np.random.RandomState(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.randint(0, 256, (70, 66, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "train" / name / f"{number}.png")
    network = {"channels": [8, 8, 8], "attention": [False, False, True], "groups": 4, "head_channels": 8, "blocks": 1}
    changes = [word for key, value in network.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    sizes = ["--batch-size", "4", "--device", "cpu", *changes]  # and three images at a time
    recipe("imagenet100.sh", *sizes, IMAGENET100="images", IMAGES="4", DISTANCE="l2", MICRO="3")
    made = record(tmp_path / "runs/imagenet100")
    assert made["training"]["objective"]["name"] == "ct"
    assert made["image_shape"] == [3, 64, 64]


@pytest.mark.parametrize("arguments", [[], ["other"]])
def test_a_part_that_is_none(recipe: Recipe, arguments: list[str]) -> None:
    with pytest.raises(AssertionError, match="teacher, model, quality, pack or unpack"):
        recipe("cifar10.sh", *arguments)
