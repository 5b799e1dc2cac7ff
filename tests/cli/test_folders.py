"""Folders of images, as people have them, through the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmap_defense.backbones.folder import read_record
from cmap_defense.cli.main import main
from cmap_defense.data import read_image
from cmap_defense.embedded import load_test_images

TINY = ["--latents", "1", "--iterations", "1", "--threads", "1"]
TRAINING = ["--channels", "8,8", "--blocks", "1", "--attention", "none", "--batch-size", "8", "--images", "8"]


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """A folder of one folder per class with the first embedded images, grey as they are."""
    images, labels = load_test_images()
    for number in range(24):
        path = tmp_path / "data" / str(int(labels[number])) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[number, 0] * 255).round().byte().numpy()).save(path)
    return tmp_path / "data"


@pytest.fixture
def flat(tmp_path: Path, grey: Path) -> Path:
    """The same images without class folders."""
    (tmp_path / "flat").mkdir()
    for path in grey.rglob("*.png"):
        shutil.copy(path, tmp_path / "flat")
    return tmp_path / "flat"


BRIEF = ["--attacks", "none", "--predictions", "1", "--reevaluations", "1"]
COMMANDS: dict[str, list[str]] = {
    "evaluate": ["evaluate", "-n", "2", *BRIEF, "--sanity-images", "0", "--no-search-on-clean"],
    "quality": ["quality", "-n", "4", "--samples", "2"],
    "analyse": ["analyse", "-n", "2", "--reference", "2", "--levels", "2", "--steps", "1", "--no-purify"],
    "study": ["study", "vote", "-n", "2", *BRIEF],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_grey_images_is_read_as_the_backbone_has_them(tmp_path: Path, grey: Path, command: str) -> None:
    given = ["-b", "fashion-mnist-ct", "-c", "embedded", "-d", str(grey), *TINY, "--json", "-o", str(tmp_path / "out")]
    assert main([*COMMANDS[command], *given]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_classes_has_no_labels_for_figures(
    tmp_path: Path, flat: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    given = ["-b", "fashion-mnist-ct", "-c", "embedded", "-d", str(flat), *TINY, "-o", str(tmp_path / "out")]
    assert main([*COMMANDS[command], *given]) == 1
    error = capsys.readouterr().err
    assert "no labels" in error
    assert "one folder of images per class" in error
    assert not (tmp_path / "out").exists()


def test_training_needs_no_classes(tmp_path: Path, flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(flat), "--image-channels", "1", *TRAINING]
    assert main(["train", *given, "-o", str(tmp_path / "run")]) == 0
    assert read_record(tmp_path / "run" / "backbone").image_shape == (1, 28, 28)
    assert main(["train", *given, "--class-conditional", "-o", str(tmp_path / "other")]) == 1
    assert "no labels of several classes" in capsys.readouterr().err


def test_a_training_that_starts_from_grey_weights_reads_grey_images(tmp_path: Path, grey: Path) -> None:
    given = ["--data", str(grey), *TRAINING]
    assert main(["train", *given, "--image-channels", "1", "-o", str(tmp_path / "first")]) == 0
    assert main(["train", *given, "--from", str(tmp_path / "first" / "backbone"), "-o", str(tmp_path / "second")]) == 0
    assert read_record(tmp_path / "second" / "backbone").image_shape == (1, 28, 28)


def test_hidden_folders_are_no_classes_of_a_training(tmp_path: Path, grey: Path) -> None:
    classes = sorted(path.name for path in grey.iterdir())
    shutil.copytree(grey / classes[0], grey / ".ipynb_checkpoints")
    given = ["--data", str(grey), "--image-channels", "1", "--class-conditional", *TRAINING]
    assert main(["train", *given, "-o", str(tmp_path / "run")]) == 0
    record = read_record(tmp_path / "run" / "backbone")
    assert (record.num_classes, record.training["class_names"]) == (len(classes), classes)


def purified(*arguments: Any) -> int:
    options = ["-b", "fashion-mnist-ct", "--latents", "1", "--iterations", "1", "--json"]
    return main(["purify", *map(str, arguments), *options])


def test_purify_takes_folders(
    tmp_path: Path, grey: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And writes folders of the same names, so that they can be evaluated; in groups, as if all were one."""
    monkeypatch.setattr("cmap_defense.cli.purify.GROUP", 10)
    (grey / ".ipynb_checkpoints").mkdir()
    (grey / ".ipynb_checkpoints" / "0.png").write_bytes(b"damaged")
    (grey / "notes.txt").write_text("not an image")
    names = sorted(path.relative_to(grey) for path in grey.rglob("[0-9]*.png") if not path.parent.name.startswith("."))
    for _ in range(2):  # what the first time wrote is not purified the second time
        assert purified(grey, "-o", grey / "purified") == 0
        answer = json.loads(capsys.readouterr().out)
        assert sorted(Path(file).relative_to(grey / "purified") for file in answer["files"]) == names
        assert len(answer["mismatch"]) == len(names)
    assert purified(grey / names[-1], "-o", tmp_path / "alone") == 0
    alone, together = tmp_path / "alone" / names[-1].name, grey / "purified" / names[-1]
    assert np.array_equal(read_image(alone, 1), read_image(together, 1))


def test_purify_names_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert purified(tmp_path / "empty", "-o", tmp_path / "out") == 1
    assert "empty has no image files in it" in capsys.readouterr().err
