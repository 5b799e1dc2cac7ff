"""Verifying a backbone, and what is noted then: official files, folders, the Hub."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmap_defense.backbones import HubRepository, verify_backbone
from cmap_defense.backbones.folder import read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser, boundary_scalings
from cmap_defense.backbones.load import load_backbone, resolve_backbone
from cmap_defense.backbones.ncsnpp import NCSNpp
from cmap_defense.backbones.registry import register, registry_entry
from cmap_defense.backbones.remote.cache import pinned
from cmap_defense.errors import BackboneFileError
from hubserver import Fault, HubServer
from tiny import CONFIG, fingerprint, tiny_backbone, tiny_checkpoint, tiny_entry, tiny_file, tiny_folder

NAME, PATH, WEIGHTS = "tiny-cd", "/models/checkpoint_80", "weights.safetensors"
CHECKPOINT = tiny_checkpoint(0)
SHA256, OTHER_SHA256 = (hashlib.sha256(content).hexdigest() for content in (CHECKPOINT, tiny_checkpoint(1)))
MODEL, OTHER_MODEL = fingerprint(tiny_backbone(0)), fingerprint(tiny_backbone(1))


@pytest.fixture
def named(hub: HubServer) -> HubServer:
    """The server, with a checkpoint that has its name."""
    register(tiny_entry(NAME, tiny_file(hub.put(PATH, CHECKPOINT))))
    return hub


@pytest.fixture
def notes(hub: HubServer, tmp_path: Path) -> Path:
    """The file with the notes, where there are some."""
    return tmp_path / "home" / "cmap-defense" / "verified.json"


@pytest.mark.usefixtures("named")
def test_name_is_verified_and_the_checksum_noted(notes: Path):
    found = verify_backbone(NAME)
    folder = resolve_backbone(NAME)
    assert (found.source, found.folder) == (NAME, folder)
    assert found.weights_sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert (found.revision, found.official_sha256) == (None, SHA256)
    assert found.boundary_error == 0
    assert -1 <= found.image_mean <= 1
    assert 0 <= found.image_std <= 1
    assert found.pinned == notes
    assert json.loads(notes.read_text())[NAME] == {registry_entry(NAME).sources[0].address: {"sha256": SHA256}}
    assert pinned(registry_entry(NAME)).verified
    assert not registry_entry(NAME).verified, "the registry itself is as it was"
    values = json.loads(json.dumps(found.to_dict()))
    assert (values["folder"], values["pinned"]) == (str(folder), str(notes))
    assert values["official_sha256"] == SHA256


def test_other_file_under_a_verified_name_is_refused(named: HubServer):
    verify_backbone(NAME)
    named.put(PATH, tiny_checkpoint(1))
    with pytest.raises(BackboneFileError, match=f"{OTHER_SHA256}.*{SHA256}"):
        resolve_backbone(NAME, force=True)
    assert fingerprint(load_backbone(NAME)) == MODEL
    named.put(PATH, CHECKPOINT)
    resolve_backbone(NAME, force=True)
    assert fingerprint(load_backbone(NAME)) == MODEL


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"tiny-cd": 3}',
        b'{"tiny-cd": {"URL": 3}}',
        b'{"tiny-cd": {"URL": {"sha256": "short"}}}',
        b'{"tiny-cd": {"URL": {"sha256": 5}}}',
        b"\xff\xfe",
    ],
)
def test_damaged_notes_are_an_error_that_names_the_file(named: HubServer, notes: Path, content: bytes):
    notes.parent.mkdir(parents=True)
    notes.write_bytes(content.replace(b"URL", (named.address + PATH).encode()))
    for use in (load_backbone, verify_backbone):
        with pytest.raises(BackboneFileError, match=r"verified\.json.*Remove it"):
            use(NAME)
    notes.unlink()
    assert verify_backbone(NAME).pinned


def test_name_on_the_hub_is_verified_with_its_commit_and_checksum(
    hub: HubServer, model_files: list[dict[str, bytes]], notes: Path
):
    repository = hub.repository("someone/model", model_files[0])
    commit, checksum = repository.refs["main"], hashlib.sha256(model_files[0][WEIGHTS]).hexdigest()
    register(tiny_entry(NAME, HubRepository(repo_id="someone/model")))
    assert not pinned(registry_entry(NAME)).verified
    found = verify_backbone(NAME)
    assert (found.revision, found.weights_sha256, found.boundary_error) == (commit, checksum, 0)
    assert found.pinned == notes
    known = pinned(registry_entry(NAME))
    assert known.verified
    assert known.sources == (HubRepository(repo_id="someone/model", revision=commit, sha256=checksum),)
    newest = repository.commit(model_files[1])
    assert verify_backbone("someone/model").revision == newest, "an id without a commit is the newest"
    assert verify_backbone("someone/model").pinned is None
    hub.script(f"/someone/model/resolve/{commit}/{WEIGHTS}", Fault(body=model_files[1][WEIGHTS]))
    with pytest.raises(BackboneFileError, match="SHA-256"):
        resolve_backbone(NAME, force=True)
    resolve_backbone(NAME, force=True)
    assert fingerprint(load_backbone(NAME)) == MODEL, "the name stands for its commit"


@pytest.mark.parametrize("given", [str, Path])
def test_folder_is_verified_and_nothing_is_noted(tmp_path: Path, notes: Path, given: Callable[[Path], Any]):
    found = verify_backbone(given(tiny_folder(tmp_path / "model")))
    assert found.weights_sha256 == read_record(tmp_path / "model").weights_sha256
    assert (found.boundary_error, found.revision, found.official_sha256, found.pinned) == (0, None, None, None)
    assert not notes.parent.exists()


@pytest.mark.parametrize("name", ["fashion-mnist-ct", "cifar10-ct-small"])
def test_packaged_models_are_verified_and_nothing_is_noted(notes: Path, name: str):
    found = verify_backbone(name)
    assert found.boundary_error == 0
    assert found.pinned is None
    assert not notes.parent.exists()


@pytest.mark.parametrize("kind", [ConsistencyBackbone, EDMDenoiser])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_model_that_makes_no_numbers_is_refused(tmp_path: Path, kind: type, value: float):
    network = tiny_backbone().network
    with torch.no_grad():
        next(network.parameters()).fill_(value)
    write_backbone(kind(network, CONFIG.image_shape), tmp_path / "model", name="broken")
    with pytest.raises(BackboneFileError, match="no working model"):
        verify_backbone(tmp_path / "model")


def bad_scalings(sigma: Tensor, *, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a denoiser: f(x, sigma_min) is not x."""
    return boundary_scalings(sigma, sigma_data=sigma_data, sigma_min=0 * sigma_min)


def test_model_that_breaks_the_boundary_condition_is_refused_unless_it_says_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_folder(tmp_path / "model")
    monkeypatch.setattr(NCSNpp, "scalings", staticmethod(bad_scalings), raising=False)
    with pytest.raises(BackboneFileError, match=r"no consistency model: \|f\(x, sigma_min\) - x\| is 0\.0"):
        verify_backbone(folder)
    monkeypatch.setattr(NCSNpp, "boundary_error", 0.1, raising=False)
    assert 0 < (verify_backbone(folder).boundary_error or 0) < 0.1
