"""The benchmark and the examples run, on tiny settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def run(cwd: Path, *arguments: str, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_benchmark_runs_and_its_loops_agree(tmp_path: Path) -> None:
    arguments = ["--images", "1", "--latents", "2", "--iterations", "2", "--repeats", "1", "--json", "figures.json"]
    run(tmp_path, str(ROOT / "benchmarks" / "loop.py"), *arguments)
    assert json.loads((tmp_path / "figures.json").read_text())


def test_the_measurement_prints_a_line_per_setting(tmp_path: Path) -> None:
    arguments = ["--on", "test", "--count", "3", "--latents", "1", "2", "--iterations", "2"]
    lines = run(tmp_path, str(ROOT / "examples" / "measure_fashion.py"), *arguments).splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["images"] == 3
    assert [row["n_latents"] for row in rows[1:]] == [1, 2]


def test_the_classifiers_training_writes_its_assets(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for stem, count in (("train", 5064), ("t10k", 300)):
        images = np.array([2051, count, 28, 28], dtype=">i4").tobytes() + rng.bytes(count * 784)
        labels = np.array([2049, count], dtype=">i4").tobytes() + (np.arange(count) % 10).astype(np.uint8).tobytes()
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    script = str(ROOT / "examples" / "train_fashion_classifier.py")
    run(tmp_path, script, "--out", "assets", "--epochs", "1", "--batch-size", "32", CMAP_DATA=str(tmp_path))
    assert "head.weight" in load_file(tmp_path / "assets" / "classifier.safetensors")
    with np.load(tmp_path / "assets" / "test256.npz") as file:
        assert file["images"].shape == (256, 28, 28)
