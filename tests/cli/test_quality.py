"""``cmap-defense quality``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cmap_defense.backbones import load_backbone
from cmap_defense.backbones.folder import read_record
from cmap_defense.common.modules import building
from tiny import tiny_folder

from .conftest import Run

Measure = Callable[..., dict[str, Any]]

EMBEDDED = ["quality", "-b", "fashion-mnist-ct", "-c", "embedded", "-d", "embedded", "-n", "3"]
TINY = [*EMBEDDED, "--n-latents", "2", "--iterations", "2", "--eps", "0.05"]
FILES = ["quality.json", "quality.md", "reconstructions.png", "samples.png"]


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def measure(run: Run, tmp_path: Path) -> Measure:
    """Runs a command and returns what it prints as JSON."""
    return lambda arguments, out="out": json.loads(run(*arguments, "--json", "-o", tmp_path / out))


@pytest.fixture
def coloured(tmp_path: Path) -> list[str]:
    """A backbone folder of 8 x 8 images, a classifier in a file and its weights, and data for both."""
    tiny_folder(tmp_path / "backbone")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))\n"
        "def bare():\n"
        "    return lambda images: images.flatten(1)[:, :4]\n",
        encoding="utf-8",
    )
    with building():
        torch.manual_seed(0)
        state = {"0.weight": torch.randn(5, 3, 3, 3), "0.bias": torch.randn(5)}
        save_file({**state, "3.weight": torch.randn(4, 5), "3.bias": torch.randn(4)}, tmp_path / "mine.safetensors")
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), generator.integers(0, 4, 20)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    sizes = ["-n", "3", "--n-latents", "2", "--iterations", "2"]
    where = ["-b", str(tmp_path / "backbone"), "-d", str(tmp_path / "data.npz")]
    named = ["-c", f"{tmp_path / 'mine.py'}:net", "--weights", str(tmp_path / "mine.safetensors")]
    return ["quality", *where, *named, *sizes]


def test_as_text_with_files(tmp_path: Path, run: Run) -> None:
    threads = torch.get_num_threads()
    text = run(*TINY, "--threads", 1, "-o", tmp_path / "out")
    assert torch.get_num_threads() == threads
    lines = text.splitlines()
    assert lines[0].startswith("128 samples; 3 images")
    assert "backbone passes" in lines[0]
    distances = [line for line in lines if line.startswith("Frechet distance in features of embedded")]
    assert len(distances) == 2
    assert "128 and 128" in distances[0]
    assert "two halves of real images" in distances[1]
    assert any(line.startswith("FID") and line.endswith("none") for line in lines)
    (reason,) = [line for line in lines if line.startswith("No FID: ")]
    assert "pip install 'cmap-defense[quality]'" in reason
    assert "mean L1 0." in text
    assert "the attacker does not know the defence" in text
    assert "PGD-20, linf 0.05" in text
    assert any(line.startswith("embedded ") for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (8 * 57 + 1, 8 * 57 + 1)


def test_as_json(tmp_path: Path, measure: Measure) -> None:
    facts = measure(TINY, "first")
    assert facts["fid"] is None
    assert "torch-fidelity" in facts["fid_reason"]
    assert facts["frechet"]["name"] == "Frechet distance in features of embedded"
    assert (facts["frechet"]["images"], facts["frechet"]["module"], facts["frechet"]["numbers"]) == (128, "head", 64)
    assert facts["frechet"]["samples"] > facts["frechet"]["halves"] > 0
    assert facts["settings"]["iterations"] == 2
    assert set(facts["classifiers"]["embedded"]) == {"clean", "purified", "attacked", "attacked_purified"}
    assert [Path(path).name for path in facts["files"]] == ["quality.json", "quality.md", "samples.png", FILES[2]]
    written = json.loads((tmp_path / "first" / "quality.json").read_text(encoding="utf-8"))
    assert written == {name: value for name, value in facts.items() if name not in ("seconds", "files")}
    assert list(written["figures"]) == ["measured"]
    command = written["figures"]["measured"]["command"]
    assert command.startswith("cmap-defense quality --backbone fashion-mnist-ct --classifier embedded")
    assert "--count 3" in command
    assert "--out" not in command
    assert "--json" not in command
    again = measure(TINY, "second")
    assert (tmp_path / "second" / "quality.json").read_text() == (tmp_path / "first" / "quality.json").read_text()
    for name in FILES:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
    assert again["frechet"] == facts["frechet"]
    other = measure([*TINY, "--seed", "1"], "third")
    assert other["frechet"] != facts["frechet"]


def test_a_folder_gets_its_figures(tmp_path: Path, coloured: list[str], measure: Measure) -> None:
    folder = tmp_path / "backbone"
    before = read_record(folder).replace(figures={"FID": 3.0, "measured": "earlier"})
    (folder / "backbone.json").write_text(before.to_json(), encoding="utf-8")
    facts = measure([*coloured, "--record"])
    assert facts["files"][-1] == str(folder / "backbone.json")
    after = read_record(folder)
    assert after.figures == {"FID": 3.0} | facts["figures"]
    assert after.replace(figures={}) == before.replace(figures={})
    assert load_backbone(folder).record == after
    assert after.figures["measured"]["Frechet distance in features of net"]["images in each set"] == 10
    untouched = (folder / "backbone.json").read_bytes()
    assert measure(coloured)["figures"]["measured"]["seed"] == 0
    assert (folder / "backbone.json").read_bytes() == untouched


def test_features_normalisation_and_other_classifiers(tmp_path: Path, coloured: list[str], measure: Measure) -> None:
    plain = measure(coloured)
    assert plain["frechet"]["module"] == "3"
    named = measure([*coloured, "--features", "0"])
    assert (named["frechet"]["module"], named["frechet"]["numbers"]) == ("0", 3)
    same = measure([*coloured, "--features", "3"])
    assert same["frechet"] == plain["frechet"]
    normalised = measure([*coloured, "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"])
    assert normalised["frechet"]["samples"] == pytest.approx(plain["frechet"]["samples"] / 0.2**2, rel=1e-3)
    assert "--mean 0.5,0.5,0.5" in normalised["figures"]["measured"]["command"]
    position = coloured.index("--weights")
    function = [*coloured[:position], *coloured[position + 2 :]]
    function[function.index("-c") + 1] = f"{tmp_path / 'mine.py'}:bare"
    without = measure(function)
    assert without["frechet"] is None
    assert "wrap it in one" in without["frechet_reason"]
    assert list(without["classifiers"]) == ["bare"]


def test_a_name_is_no_folder_even_where_a_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """The figures of the packaged model are not written into somebody's folder."""
    own = tiny_folder(tmp_path / "fashion-mnist-ct", 0)
    before = (own / "backbone.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    error = run(*TINY, "--record", "-o", "out", status=2)
    assert "must be a folder with a backbone.json" in error
    assert (own / "backbone.json").read_bytes() == before
