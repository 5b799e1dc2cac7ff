"""Paths below the home folder, and accounts that have none."""

from pathlib import Path

import pytest
import torch

from cmap_defense.backbones import load_backbone
from cmap_defense.backbones.remote import cache, hub
from cmap_defense.cli.main import main
from cmap_defense.common.paths import expanded, home, hub_folder
from cmap_defense.data import load_dataset
from cmap_defense.errors import CmapError, SettingsError


def test_with_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home("SOME_VARIABLE") == tmp_path
    assert expanded("~/some") == tmp_path / "some"
    assert expanded(Path("some/~")) == Path("some/~")


def test_without_one_the_error_names_a_variable(homeless: None) -> None:
    with pytest.raises(SettingsError, match="set the environment variable SOME_VARIABLE"):
        home("SOME_VARIABLE")
    with pytest.raises(SettingsError, match=r"~/some begins at a home folder.*HOME"):
        expanded("~/some")
    assert expanded("/some/where") == Path("/some/where")


def test_the_folder_of_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, homeless: None) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_HOME", raising=False)
    with pytest.raises(SettingsError, match="TORCH_HOME"):
        hub_folder()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert hub_folder() == tmp_path / "hub"


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch, homeless: None) -> None:
    """What huggingface_hub makes of an account without a home folder."""
    monkeypatch.delenv("CMAP_DEFENSE_CACHE", raising=False)
    monkeypatch.setattr(cache.constants, "HF_HOME", "~/.cache/huggingface")
    monkeypatch.setattr(cache.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")


def test_the_cache_of_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hugging_face: None) -> None:
    with pytest.raises(SettingsError, match="CMAP_DEFENSE_CACHE"):
        cache.cache_folder()
    with pytest.raises(SettingsError, match="HF_HOME"):
        hub.fetch_folder("some/where", None, ["*.json"])
    monkeypatch.setenv("CMAP_DEFENSE_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path


@pytest.mark.parametrize("path", ["~/some.npz", "~no-such-user/some.npz"])
def test_data_and_backbones_below_a_home_folder_that_is_not_known(homeless: None, path: str) -> None:
    for read in (load_dataset, load_backbone):
        with pytest.raises(CmapError, match="home folder that is not known"):
            read(path)


def test_options_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """A shell leaves ``--out=~/some`` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--images", "1", "--n-latents", "1", "--out=~/some"]) == 0
    assert (tmp_path / "some" / "sheet.png").is_file()
    assert not (tmp_path / "~").exists()
    capsys.readouterr()
    request.getfixturevalue("homeless")
    assert main(["demo", "--out=~/some"]) == 2
    assert "home folder that is not known" in capsys.readouterr().err
