"""``cmap-defense adapt``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cmap_defense import CMAP, CMAPSettings, load_adapted
from cmap_defense.cli.build import imported_model
from cmap_defense.embedded import load_classifier
from cmap_defense.errors import SettingsError
from cmap_defense.purifiers import ADP, GDMP, Identity, OneStep, Purifier

from .conftest import Run

OPTIONS = ["--images", "32", "--batch-size", "8", "--checkpoint-every", "16"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = np.random.RandomState(0).randint(0, 256, (24, 28, 28, 1)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(24) % 10)
    return tmp_path / "data.npz"


def test_it_writes_weights_for_the_other_commands(run: Run, data: Path, tmp_path: Path) -> None:
    model = ["-b", "fashion-mnist-edm", "-c", "embedded", "-d", data]
    attack = ["--adversarial", "--eps", "0.05", "--attack-steps", "1", "--hold-out", "8"]
    out = tmp_path / "adapted"
    printed = json.loads(run("adapt", *model, *attack, *OPTIONS, "-o", out, "--json"))
    assert printed["finished"]
    assert printed["purifier"] == {"class": "OneStep", "level": 0.5}
    assert printed["versions"] == 1
    assert printed["threat"]["eps"] == 0.05
    assert len(printed["held_out_scores"]) == 2
    assert (out / "loss.png").is_file()
    assert not load_adapted(out, load_classifier()).training
    read = imported_model("embedded", out / "classifier.safetensors", torch.device("cpu"), "--classifier")
    assert vars(read)["adapted_to"] == load_adapted(out, load_classifier()).adapted_to
    again = run("adapt", *model, *attack, *OPTIONS, "-o", out)
    assert "8 held-out images" in again
    assert "32 images seen" in again
    assert "other settings" in run("adapt", *model, *OPTIONS, "-o", out, status=1)


def test_behind_a_chain_on_two_backbones(run: Run, data: Path, tmp_path: Path) -> None:
    given = ["adapt", "-b", "fashion-mnist-ct", "-b", "fashion-mnist-edm", "-c", "embedded", "-d", data, *OPTIONS]
    parts = "purifiers=diffpure t=10 step=0.01, cmap n_latents=1 iterations=1"
    given += ["--purifier", "chain", "--purifier-set", parts, "-o", tmp_path / "adapted", "--json"]
    record = json.loads(run(*given))
    assert record["finished"]
    assert [part["purifier"] for part in record["purifier"]["purifiers"]] == ["diffpure", "cmap"]
    assert "give one backbone, or two" in run(*given, "-b", "fashion-mnist-ct", status=2)


def test_wrong_usage(run: Run, data: Path, tmp_path: Path) -> None:
    model = ["adapt", "-b", "fashion-mnist-edm", "-c", "embedded", "-d", data, "-o", tmp_path / "adapted"]
    assert "did you mean 8/255?" in run(*model, "--adversarial", "--eps", "8", status=2)
    assert "has no setting" in run(*model, "--purifier-set", "sigma=1", status=2)
    assert "leaves nothing" in run(*model, "--hold-out", "24", status=1)


@pytest.mark.parametrize(
    ("options", "purifier"),
    [
        ([], OneStep(n_latents=1)),
        (["--purifier-set", "n_latents=3", "--purifier-set", "level=0.6"], OneStep(level=0.6, n_latents=3)),
        (["--purifier", "gdmp", "--purifier-set", "preset=cifar10-spsa"], GDMP.preset("cifar10-spsa")),
        (["--purifier", "adp"], ADP(n_latents=1)),
        (["--purifier", "cmap"], CMAP(CMAPSettings(n_latents=1))),
        (["--purifier", "identity"], Identity()),
    ],
)
def test_one_version_is_trained_on_unless_another_number_is_given(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], purifier: Purifier
) -> None:
    found = []

    def adapt(*arguments: object, **_: object) -> None:
        found.append(arguments[2])
        raise SettingsError("no more is needed")

    monkeypatch.setattr("cmap_defense.cli.adapt.adapt", adapt)
    backbone = "fashion-mnist-ct" if isinstance(purifier, CMAP) else "fashion-mnist-edm"
    run("adapt", "-b", backbone, "-c", "embedded", "-d", data, *options, "-o", tmp_path / "out", status=1)
    assert found == [purifier]
