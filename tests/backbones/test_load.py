"""From what a user writes to a backbone: a folder, a path or a name; ``remote/test_hub.py`` has Hub ids."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cmap_defense.backbones.folder import write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser
from cmap_defense.backbones.load import load_backbone, resolve_backbone
from cmap_defense.backbones.registry.entry import LocalFolder, RegistryEntry
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import BackboneFileError, CmapError, UnknownNameError, WrongKindError
from toys import noise

CONFIG = CompactUNetConfig(
    image_shape=(3, 8, 4), channels=(4, 8), blocks=1, attention=(False, True), head_channels=4, embedding=8
)
REPO = "someone/toy-model"


def write_toy(folder: Path) -> Path:
    """A whole backbone folder."""
    with torch.random.fork_rng(devices=[]):
        network = CompactUNet(CONFIG)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(0.3 * noise(*parameter.shape, seed=index))
    write_backbone(ConsistencyBackbone(network, CONFIG.image_shape), folder, name="toy")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "model")


class Somewhere(os.PathLike):
    """A path of a kind of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Somewhere])
def test_folder_is_loaded_from_text_and_from_paths_of_any_kind(folder: Path, kind: type):
    backbone = load_backbone(kind(folder))
    assert backbone.record is not None
    assert backbone.record.name == "toy"
    assert backbone.generate(noise(2, *CONFIG.image_shape, seed=1)).shape == (2, *CONFIG.image_shape)


def test_relative_folder_wins_over_a_hub_id_spelt_alike(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "someone").mkdir()
    folder.rename(tmp_path / "someone" / "toy-model")
    monkeypatch.chdir(tmp_path)
    assert load_backbone(REPO).image_shape == CONFIG.image_shape


def test_tilde_is_the_home_folder(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_backbone("~/model") == folder
    assert load_backbone("~/model").image_shape == CONFIG.image_shape


@pytest.mark.parametrize(
    "source",
    [
        "./nowhere",
        "/no/such/folder",
        "~/no-such-folder-here",
        "runs/mine/backbone",
        "a b/c",
        "runs/",
        Path("nowhere/at-all"),
    ],
)
def test_missing_folder_is_a_file_error_and_not_looked_for_on_the_hub(source: str | Path):
    with pytest.raises(BackboneFileError, match="backbone folder"):
        load_backbone(source)


def test_home_of_an_unknown_person_is_an_error_of_this_package():
    with pytest.raises(CmapError):
        load_backbone("~no-such-person-here/model")


def test_unknown_name_lists_the_near_match():
    with pytest.raises(UnknownNameError, match="'fashion-mnist-ct'"):
        load_backbone("fashion-mnist-c")


@pytest.mark.parametrize("source", ["a b", "name@revision", "backbone"])
def test_what_is_neither_folder_nor_hub_id_is_an_unknown_name(source: str):
    with pytest.raises(UnknownNameError, match="no backbone"):
        load_backbone(source)


def test_the_record_of_a_registered_folder_says_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of a name says "consistency" where nothing is said."""
    with torch.random.fork_rng(devices=[]):
        network = CompactUNet(CONFIG)
    write_backbone(EDMDenoiser(network, CONFIG.image_shape), tmp_path, name="toy")
    place: Any = LocalFolder(folder=tmp_path)
    entry = RegistryEntry(name="mine", description="", sources=(place,), image_shape=CONFIG.image_shape)
    monkeypatch.setattr("cmap_defense.backbones.load.entry_of", lambda source: entry)
    assert load_backbone("mine", kind="denoiser").kind == "denoiser"
    with pytest.raises(WrongKindError, match="'toy' is a denoiser"):
        load_backbone("mine", kind="consistency")
