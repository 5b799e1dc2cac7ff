"""Folders of images in the commands that evaluate and train."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from cmap_defense.backbones.folder import read_record
from cmap_defense.embedded import load_test_images

from .conftest import Run

TINY = ["--n-latents", "1", "--threads", "1"]
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
    "quality": ["quality", "-n", "4", "--samples", "2"],
    "study": ["study", "vote", "-n", "2", *BRIEF],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_grey_images_is_read_as_the_backbone_has_them(
    tmp_path: Path, grey: Path, run: Run, command: str
) -> None:
    given = ["-b", "fashion-mnist-ct", "-c", "embedded", "-d", grey, *TINY, "--json", "-o", tmp_path / "out"]
    run(*COMMANDS[command], *given)


def test_a_classifier_is_adapted_on_a_folder_as_the_backbone_has_its_images(
    tmp_path: Path, grey: Path, run: Run
) -> None:
    brief = ["--images", 8, "--batch-size", 4, "--hold-out", 4, "--threads", 1]
    run("adapt", "-b", "fashion-mnist-ct", "-c", "embedded", "-d", grey, *brief, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "classifier.safetensors").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_classes_has_no_labels_for_figures(tmp_path: Path, flat: Path, run: Run, command: str) -> None:
    given = ["-b", "fashion-mnist-ct", "-c", "embedded", "-d", flat, *TINY, "-o", tmp_path / "out"]
    error = run(*COMMANDS[command], *given, status=1)
    assert "no labels" in error
    assert "one folder of images per class" in error
    assert not (tmp_path / "out").exists()


def test_training_needs_no_classes(tmp_path: Path, flat: Path, run: Run) -> None:
    given = ["train", "--data", flat, "--image-channels", 1, *TRAINING]
    run(*given, "-o", tmp_path / "run")
    assert read_record(tmp_path / "run" / "backbone").image_shape == (1, 28, 28)
    assert "no labels of several classes" in run(*given, "--class-conditional", "-o", tmp_path / "other", status=1)
