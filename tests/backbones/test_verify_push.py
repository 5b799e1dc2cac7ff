"""Verifying a backbone, what is noted then, and publishing one, to a Hub on the loopback device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from cmap_defense.backbones import push_backbone, verify_backbone
from cmap_defense.backbones.folder import RECORD_FILE, read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser, boundary_scalings
from cmap_defense.backbones.load import load_backbone, resolve_backbone
from cmap_defense.backbones.ncsnpp import NCSNpp
from cmap_defense.backbones.registry import LocalFolder, register, registry_entry
from cmap_defense.backbones.remote.cache import pinned
from cmap_defense.backbones.remote.card import hub_card
from cmap_defense.errors import BackboneFileError, UnknownNameError
from elsewhere import Answer, run_elsewhere
from hubserver import ALWAYS, OTHER_TOKEN, TOKEN, Fault, HubServer, serving
from tiny import (
    CONFIG,
    files_of,
    fingerprint,
    own_names,
    tiny_backbone,
    tiny_checkpoint,
    tiny_entry,
    tiny_file,
    tiny_folder,
    tiny_pipeline,
)

NAME, PATH, WEIGHTS = "tiny-cd", "/models/checkpoint_80", "weights.safetensors"
CHECKPOINT = tiny_checkpoint(0)
SHA256, OTHER_SHA256 = (hashlib.sha256(content).hexdigest() for content in (CHECKPOINT, tiny_checkpoint(1)))
MODEL, OTHER_MODEL = fingerprint(tiny_backbone(0)), fingerprint(tiny_backbone(1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, a network, and names of one's own."""
    monkeypatch.setenv("CMAP_DEFENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with own_names():
        yield tmp_path / "cache"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server with a checkpoint, which has its name."""
    with serving() as server:
        register(tiny_entry(NAME, tiny_file(server.put(PATH, CHECKPOINT))))
        yield server


# -------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.usefixtures("hub")
def test_name_is_verified_and_the_checksum_noted(cache: Path):
    found = verify_backbone(NAME)
    folder = resolve_backbone(NAME)
    assert (found.source, found.folder) == (NAME, folder)
    assert found.weights_sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert (found.revision, found.official_sha256) == (None, SHA256)
    assert found.boundary_error == 0
    assert -1 <= found.image_mean <= 1
    assert 0 <= found.image_std <= 1
    assert found.pinned == cache / "verified.json"
    assert json.loads(found.pinned.read_text())[NAME] == {registry_entry(NAME).sources[0].address: {"sha256": SHA256}}


@pytest.mark.usefixtures("hub")
def test_what_was_found_is_json():
    found = verify_backbone(NAME)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["folder"] == str(found.folder)
    assert values["pinned"] == str(found.pinned)
    assert values["official_sha256"] == SHA256


@pytest.mark.usefixtures("hub")
def test_verified_name_is_shown_as_verified():
    assert not pinned(registry_entry(NAME)).verified
    verify_backbone(NAME)
    assert pinned(registry_entry(NAME)).verified
    assert not registry_entry(NAME).verified, "the registry itself is as it was"


def test_other_file_under_a_verified_name_is_refused(hub: HubServer):
    verify_backbone(NAME)
    hub.put(PATH, tiny_checkpoint(1))
    with pytest.raises(BackboneFileError, match=f"{OTHER_SHA256}.*{SHA256}"):
        resolve_backbone(NAME, force=True)
    assert fingerprint(load_backbone(NAME)) == MODEL
    hub.put(PATH, CHECKPOINT)
    resolve_backbone(NAME, force=True)
    assert fingerprint(load_backbone(NAME)) == MODEL


def test_other_file_under_a_name_that_was_not_verified_is_taken(hub: HubServer, cache: Path):
    verify_backbone(NAME, remember=False)
    assert not (cache / "verified.json").exists()
    hub.put(PATH, tiny_checkpoint(1))
    resolve_backbone(NAME, force=True)
    assert fingerprint(load_backbone(NAME)) == OTHER_MODEL


def test_note_is_of_an_address_and_means_no_other(hub: HubServer):
    verify_backbone(NAME)
    register(tiny_entry(NAME, tiny_file(hub.put("/elsewhere", tiny_checkpoint(1)))), replace=True)
    assert not pinned(registry_entry(NAME)).verified
    assert fingerprint(load_backbone(NAME)) == OTHER_MODEL


def test_notes_of_several_names_stand_beside_each_other(hub: HubServer, cache: Path):
    register(tiny_entry("other", tiny_file(hub.put("/other", tiny_checkpoint(1)))))
    verify_backbone(NAME)
    verify_backbone("other")
    verify_backbone(NAME)
    assert list(json.loads((cache / "verified.json").read_text())) == [NAME, "other"]


@pytest.mark.parametrize("given", [str, Path])
def test_folder_is_verified_and_nothing_is_noted(tmp_path: Path, cache: Path, given: Callable[[Path], Any]):
    found = verify_backbone(given(tiny_folder(tmp_path / "model")))
    assert found.weights_sha256 == read_record(tmp_path / "model").weights_sha256
    assert (found.boundary_error, found.revision, found.official_sha256, found.pinned) == (0, None, None, None)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["fashion-mnist-ct", "cifar10-ct-small"])
def test_packaged_models_are_verified_and_nothing_is_noted(cache: Path, name: str):
    found = verify_backbone(name)
    assert found.boundary_error == 0
    assert found.pinned is None
    assert not cache.exists()


def test_denoiser_has_no_boundary(hub: HubServer):
    register(tiny_entry(NAME, tiny_file(hub.address + PATH), kind="denoiser"), replace=True)
    found = verify_backbone(NAME)
    assert found.boundary_error is None
    assert found.pinned is not None


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


def test_damaged_folder_is_refused(tmp_path: Path):
    folder = tiny_folder(tmp_path / "model")
    (folder / WEIGHTS).write_bytes((tiny_folder(tmp_path / "other", 1) / WEIGHTS).read_bytes())
    with pytest.raises(BackboneFileError, match="SHA-256"):
        verify_backbone(folder)


def test_what_there_is_not_cannot_be_verified():
    with pytest.raises(UnknownNameError, match=NAME):
        verify_backbone(NAME)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"tiny-cd": 3}',
        b'{"tiny-cd": {"URL": {"sha256": "short"}}}',
        b'{"tiny-cd": {"URL": {"sha256": 5}}}',
        b"\xff\xfe",
    ],
)
def test_damaged_notes_are_an_error_that_names_the_file(hub: HubServer, cache: Path, content: bytes):
    cache.mkdir()
    (cache / "verified.json").write_bytes(content.replace(b"URL", (hub.address + PATH).encode()))
    for use in (load_backbone, verify_backbone):
        with pytest.raises(BackboneFileError, match=r"verified\.json.*Remove it"):
            use(NAME)
    (cache / "verified.json").unlink()
    assert verify_backbone(NAME).pinned


def test_folder_of_a_name_that_is_gone_is_an_error(tmp_path: Path):
    register(tiny_entry(NAME, LocalFolder(folder=tmp_path / "gone")))
    for use in (load_backbone, verify_backbone):
        with pytest.raises(BackboneFileError, match=f"gone, where {NAME} should be"):
            use(NAME)


# ----------------------------------------------------------------------------------------------------------------- Hub

Answers = dict[str, Answer]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with folders to publish."""
    place = tmp_path_factory.mktemp("push")
    described = {"licence": "MIT", "description": "Tiny.", "source": {"url": "https://example.org"}}
    tiny_folder(place / "model", **described)
    (place / "model" / "LICENSE").write_text("Do as you like.\n")
    (place / "model" / "NOTICE.txt").write_text("Notice.\n")
    (place / "model" / "secrets.txt").write_text("not for others\n")
    tiny_folder(place / "carded", 1)
    (place / "carded" / "README.md").write_text("---\nlicense: mit\n---\n\n# My own words, ärger\n", encoding="utf-8")
    tiny_folder(place / "ill-carded")
    (place / "ill-carded" / "README.md").write_text("No head.\n")
    tiny_folder(place / "damaged")
    (place / "damaged" / WEIGHTS).write_bytes(b"not weights")
    tiny_folder(place / "bare")
    (place / "bare" / RECORD_FILE).unlink()
    pipeline = load_backbone(tiny_pipeline(place / "bare-pipeline"))
    write_backbone(pipeline, place / "pipeline", name="pipeline", licence="own, see below")
    return place


@pytest.fixture(scope="module")
def org() -> Iterator[HubServer]:
    """A Hub, with a model that has a name and is replaced after it was fetched, and broken ways to publish."""
    with serving() as server:
        server.script("/api/models/someone/no-preupload/*", Fault(methods=("POST",), status=500, times=ALWAYS))
        server.script("/api/models/someone/no-commit/commit/*", Fault(methods=("POST",), status=403, times=ALWAYS))
        yield server


@pytest.fixture(scope="module")
def answers(org: HubServer, place: Path) -> Answers:
    """What came of each step of a process that verifies and publishes."""
    model, other = files_of(tiny_folder(place / "first", 0)), files_of(tiny_folder(place / "second", 1))
    repository = org.repository("someone/published", model)
    weights = "/someone/published/resolve/*/weights.safetensors"
    org.script(weights, Fault(afterwards=lambda: repository.commit(other)), Fault(body=other[WEIGHTS]))
    published = {"repo_id": "someone/published"}

    def push(folder: str, name: str, *more: object) -> list[object]:
        return ["push", str(place / folder), f"someone/{name}", *more]

    steps: dict[str, list[Any]] = {
        "": ["hurry"],
        "name": ["name", "published", published],
        "before": ["entry", "published"],
        "verify": ["verify", "published"],
        "after": ["entry", "published"],
        "load": ["load", "published"],
        "force, tampered": ["pull", "published", True],
        "force": ["pull", "published", True],
        "load again": ["load", "published"],
        "id": ["verify", "someone/published"],
        "no token": push("model", "model"),
        "a": ["environ", "HF_TOKEN", OTHER_TOKEN],
        "no right": push("model", "model"),
        "b": ["environ", "HF_TOKEN", TOKEN],
        "no such folder": push("nowhere", "nowhere"),
        "damaged": push("damaged", "damaged"),
        "bare": push("bare", "bare"),
        "bare pipeline": push("bare-pipeline", "bare-pipeline"),
        "no organisation": ["push", str(place / "model"), "model"],
        "model": ["push_and_load", str(place / "model"), "someone/model"],
        "again": push("model", "model"),
        "newer": push("carded", "model"),
        "private": ["push_and_load", str(place / "carded"), "someone/private", True],
        "ill-carded": push("ill-carded", "ill-carded"),
        "no preupload": push("model", "no-preupload"),
        "no commit": push("model", "no-commit"),
        "pipeline": ["push_and_load", str(place / "pipeline"), "someone/pipeline"],
    }
    return dict(zip(steps, run_elsewhere(*steps.values(), home=place / "home", address=org.address), strict=True))


def check_error(answer: Answer, kind: str, *words: str) -> None:
    """An error of this package, of that kind, that holds these words."""
    assert {"CmapError", kind} <= set(answer.kinds), answer
    for word in words:
        assert word in answer.error


def test_name_on_the_hub_is_verified_with_its_commit_and_checksum(answers: Answers, org: HubServer, place: Path):
    first, second = org.repositories["someone/published"].commits
    checksum = read_record(place / "first").weights_sha256
    found = answers["verify"].value
    assert (found["revision"], found["weights_sha256"], found["boundary_error"]) == (first, checksum, 0)
    assert found["pinned"] == str(place / "home" / "cmap-defense" / "verified.json")
    assert answers["before"].value["verified"] is False
    assert answers["after"].value["verified"] is True
    (source,) = answers["after"].value["sources"]
    assert (source["revision"], source["sha256"]) == (first, checksum)
    assert org.repositories["someone/published"].refs["main"] == second, "the branch is elsewhere meanwhile"


def test_verified_name_stands_for_its_commit_although_the_branch_moves(answers: Answers):
    for step in ("load", "load again"):
        assert answers[step].value["fingerprint"] == MODEL
    assert answers["force"].error == ""


def test_other_file_under_a_verified_name_on_the_hub_is_refused(answers: Answers):
    check_error(answers["force, tampered"], "BackboneFileError", "SHA-256")


def test_hub_id_is_verified_and_nothing_is_noted(answers: Answers, org: HubServer):
    found = answers["id"].value
    assert found["pinned"] is None
    assert found["revision"] == org.repositories["someone/published"].refs["main"]


# ---------------------------------------------------------------------------------------------------------------- push


def test_what_is_published_arrives_byte_for_byte_and_nothing_else_does(answers: Answers, org: HubServer, place: Path):
    repository = org.repositories["someone/model"]
    commit = answers["model"].value["pushed"].removeprefix("someone/model@")
    sent = repository.commits[commit]
    assert sorted(sent) == sorted(["LICENSE", "NOTICE.txt", "README.md", RECORD_FILE, WEIGHTS])
    for name in sorted(sent.keys() - {"README.md"}):
        assert sent[name] == (place / "model" / name).read_bytes(), name
    assert sent["README.md"].decode() == hub_card(read_record(place / "model"), "someone/model")
    assert not repository.private


def test_what_is_published_loads_under_the_id_that_was_returned(answers: Answers):
    loaded = answers["model"].value
    assert loaded["fingerprint"] == MODEL
    assert (loaded["name"], loaded["licence"]) == ("tiny", "MIT")


def test_publishing_the_same_again_changes_nothing(answers: Answers, org: HubServer):
    assert answers["again"].value == answers["model"].value["pushed"]
    created, first, second = org.repositories["someone/model"].commits
    assert answers["model"].value["pushed"].endswith(first)
    assert answers["newer"].value.endswith(second)
    assert org.repositories["someone/model"].commits[created] == {}


def test_own_card_is_kept(answers: Answers, org: HubServer, place: Path):
    assert answers["private"].error == ""
    assert org.repositories["someone/private"].newest["README.md"] == (place / "carded" / "README.md").read_bytes()


def test_private_repository_is_private_and_loads_with_the_token(answers: Answers, org: HubServer):
    assert org.repositories["someone/private"].private
    assert answers["private"].value["fingerprint"] == OTHER_MODEL


def test_pipeline_is_published_with_its_configurations(answers: Answers, org: HubServer, place: Path):
    assert answers["pipeline"].error == ""
    sent = org.repositories["someone/pipeline"].newest
    assert {name: content for name, content in sent.items() if name != "README.md"} == files_of(place / "pipeline")
    assert answers["pipeline"].value["name"] == "pipeline"


def test_without_a_token_nothing_is_published_and_the_error_names_it(answers: Answers):
    check_error(answers["no token"], "UnknownNameError", "someone/model", "401", "hf auth login", "HF_TOKEN")


def test_without_the_right_nothing_is_published_and_the_error_says_so(answers: Answers):
    check_error(answers["no right"], "UnknownNameError", "someone/model", "403", "a token with the right to it")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("no such folder", ["nowhere", RECORD_FILE]),
        ("damaged", [WEIGHTS, "safetensors"]),
        ("bare", [RECORD_FILE, "convert or train"]),
        ("bare pipeline", [RECORD_FILE, "convert or train"]),
    ],
)
def test_folder_that_is_not_whole_is_refused_before_anything_is_sent(
    answers: Answers, org: HubServer, step: str, words: list[str]
):
    check_error(answers[step], "BackboneFileError", *words)
    assert f"someone/{step.replace(' ', '-')}" not in org.repositories


@pytest.mark.parametrize("step", ["no organisation", "ill-carded", "no preupload", "no commit"])
def test_hub_that_refuses_is_an_error_of_this_package(answers: Answers, step: str):
    assert "CmapError" in answers[step].kinds, answers[step]
    assert step == "no organisation" or f"someone/{step.replace(' ', '-')}" in answers[step].error


def test_card_that_the_hub_refuses_is_told(answers: Answers):
    check_error(answers["ill-carded"], "BackboneFileError", "README.md", '"---" is missing')


def test_offline_nothing_is_published(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneFileError, match=r"someone/model could not be pushed to.*HF_HUB_OFFLINE"):
        push_backbone(place / "model", "someone/model")
