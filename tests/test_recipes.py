"""The recipes run, for a few steps on made-up images: their options exist, and a part goes on where another stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
TINY = ["--channels", "8,16", "--blocks", "1", "--batch-size", "16", "--checkpoint-every", "16"]


def recipe(cwd: Path, name: str, *arguments: str, **environment: str) -> str:
    """What a recipe prints, with this environment's programs on the path and nothing compiled."""
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": found, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "CMAP_DATA": str(cwd)}
    done = subprocess.run(
        ["bash", str(RECIPES / name), *arguments],
        cwd=cwd,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def record(folder: Path) -> dict:
    return json.loads((folder / "backbone" / "backbone.json").read_text())


def test_fashion_mnist(tmp_path: Path) -> None:
    (tmp_path / "fashion-mnist").mkdir()
    rng = np.random.RandomState(0)
    for stem, count in (("train", 5040), ("t10k", 8)):
        images = np.array([2051, count, 28, 28], dtype=">i4").tobytes() + rng.bytes(count * 784)
        labels = np.array([2049, count], dtype=">i4").tobytes() + (np.arange(count) % 10).astype(np.uint8).tobytes()
        (tmp_path / "fashion-mnist" / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / "fashion-mnist" / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    recipe(tmp_path, "fashion-mnist.sh", "--images", "32", *TINY)
    assert record(tmp_path / "runs/fashion-mnist")["training"]["objective"]["name"] == "ect"


def test_cifar10_in_its_parts(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    for split, count in (("train", 40), ("test", 24)):
        images, labels = rng.randint(0, 256, (count, 32, 32, 3)), np.arange(count) % 10
        np.savez(tmp_path / f"cifar10_{split}.npz", images=images.astype(np.uint8), labels=labels.astype(np.uint8))
    small = [*TINY, "--attention", "1"]
    recipe(tmp_path, "cifar10.sh", "teacher", "--images", "32", *small)
    assert record(tmp_path / "runs/cifar10/teacher")["kind"] == "diffusion"
    recipe(tmp_path, "cifar10.sh", "model", *small, IMAGES="32")
    made = record(tmp_path / "runs/cifar10/model")
    assert (made["kind"], made["name"]) == ("consistency", "cifar10-ct-small")
    files = [path.stat().st_size for path in (tmp_path / "runs/cifar10/model").rglob("*") if path.is_file()]
    assert max(files) <= 16 * 2**20
    sizes = ["-n", "4", "--latents", "2", "--iterations", "2", "--samples", "8"]
    recipe(tmp_path, "cifar10.sh", "quality", *sizes)
    assert record(tmp_path / "runs/cifar10/model")["figures"]["measured"]


def test_imagenet100(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    rng = np.random.RandomState(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.randint(0, 256, (70, 66, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "train" / name / f"{number}.png")
    network = {"channels": [8, 16], "attention": [False, True], "groups": 4, "head_channels": 8, "blocks": 1}
    changes = [word for key, value in network.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    sizes = ["--batch-size", "4", "--device", "cpu", *changes]
    recipe(tmp_path, "imagenet100.sh", *sizes, IMAGENET100="images", IMAGES="8", DISTANCE="l2")
    made = record(tmp_path / "runs/imagenet100")
    assert made["training"]["objective"]["name"] == "ct"
    assert made["image_shape"] == [3, 64, 64]


@pytest.mark.parametrize("arguments", [[], ["other"]])
def test_a_part_that_is_none(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(AssertionError, match="teacher, model or quality"):
        recipe(tmp_path, "cifar10.sh", *arguments)
