"""``cmap-defense detect``."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from cmap_defense.detection import KINDS

from .conftest import Run

TINY = ["detect", "-n", "3", "--reference", "4", "--levels", "2", "--steps", "2"]
TINY += ["--n-latents", "2", "--iterations", "2"]


def test_as_text_with_files(tmp_path: Path, run: Run) -> None:
    threads = torch.get_num_threads()
    text = run(*TINY, "--threads", 1, "-o", tmp_path / "out")
    assert torch.get_num_threads() == threads
    for name in KINDS:
        assert any(line.startswith(name.replace("_", " ")) for line in text.splitlines())
    assert "K = 2 latents, N = 2 iterations" in text
    assert "further than clean ones" in text
    assert "distinguished from noisy ones with AUROC" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detection.json", "detection.svg"]
    written = json.loads((tmp_path / "out" / "detection.json").read_text(encoding="utf-8"))
    assert {kind["count"] for kind in written["kinds"].values()} == {3}
    assert written["references"] == 4
    assert ElementTree.parse(tmp_path / "out" / "detection.svg").getroot().tag.endswith("svg")


def test_two_backbones(tmp_path: Path, run: Run) -> None:
    """The images are generated as by the consistency model, and the scores are the denoiser's."""
    names, found = ["fashion-mnist-ct", "fashion-mnist-edm"], []
    for backbones in (names, names[::-1], names[:1]):
        given = [word for name in backbones for word in ("-b", name)]
        printed = json.loads(run(*TINY, *given, "--no-purify", "--json", "-o", tmp_path))
        found.append(printed["kinds"]["clean"])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_as_json_with_the_deep_kernel(tmp_path: Path, run: Run) -> None:
    arguments = [*TINY, "--kernel", "deep", "--training", 4, "--no-purify", "--json", "-o", tmp_path]
    found = json.loads(run(*arguments))
    assert found["kernel"]["name"] == "deep"
    assert list(found["kinds"]) == list(KINDS[:4])
    assert found["settings"]["n_latents"] == 2
    assert len(found["eps"]["sigmas"]) == 2
    assert found["lacking"] is None
    assert [Path(path).name for path in found["files"]] == ["detection.json", "detection.svg"]


def test_generated_images_are_those_of_noise_whatever_level_purifies(tmp_path: Path, run: Run) -> None:
    found = [
        json.loads(run(*TINY, "--no-purify", "--json", *more, "-o", tmp_path / str(number)))
        for number, more in enumerate(([], ["--purifier-set", "level=1"]))
    ]
    assert found[0]["kinds"] == found[1]["kinds"]


def test_other_data_without_matplotlib(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (9, 28, 28), dtype=np.uint8), generator.integers(0, 10, 9)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    given = [*TINY, "--no-purify", "-d", tmp_path / "data.npz"]
    found = json.loads(run(*given, "--json", "-o", tmp_path / "out"))
    assert found["references"] == 4
    assert "cmap-defense[report]" in found["lacking"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detection.json"]
    error = run(*given, "--reference", 7, "-o", tmp_path / "none", status=2)
    assert "There are 9 images, but 3 + 7 are wanted: give smaller numbers with -n, --reference." in error
    assert not (tmp_path / "none").exists()
