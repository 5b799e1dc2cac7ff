"""Publishing a backbone, to a Hub on the loopback device."""

from pathlib import Path

import pytest

from cmap_defense.backbones import push_backbone
from cmap_defense.backbones.folder import RECORD_FILE, read_record, write_backbone
from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.remote.card import hub_card
from cmap_defense.errors import BackboneFileError, CmapError, UnknownNameError
from hubserver import ALWAYS, OTHER_TOKEN, TOKEN, Fault, HubServer
from tiny import files_of, fingerprint, tiny_backbone, tiny_folder, tiny_pipeline

REPO, WEIGHTS = "someone/model", "weights.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of the client's own upload


@pytest.fixture
def owned(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, with the token of the organisation "someone"."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to publish."""
    return tiny_folder(tmp_path / "model", licence="MIT", description="Tiny.", source={"url": "https://example.org"})


def test_folder_arrives_byte_for_byte_with_a_card_and_nothing_else_does(owned: HubServer, folder: Path):
    for name in ("LICENSE", "NOTICE.txt", "secrets.txt"):
        (folder / name).write_text(name)
    pushed = push_backbone(folder, REPO)
    repository = owned.repositories[REPO]
    sent = repository.commits[pushed.removeprefix(f"{REPO}@")]
    assert sorted(sent) == sorted(["LICENSE", "NOTICE.txt", "README.md", RECORD_FILE, WEIGHTS])
    for name in sorted(sent.keys() - {"README.md"}):
        assert sent[name] == (folder / name).read_bytes(), name
    assert sent["README.md"].decode() == hub_card(read_record(folder), REPO)
    assert not repository.private
    loaded = load_backbone(pushed)
    assert fingerprint(loaded) == fingerprint(tiny_backbone())
    assert loaded.record is not None
    assert (loaded.record.name, loaded.record.licence) == ("tiny", "MIT")


def test_publishing_the_same_again_changes_nothing_and_another_model_makes_a_commit(
    owned: HubServer, folder: Path, tmp_path: Path
):
    first = push_backbone(folder, REPO)
    assert push_backbone(folder, REPO) == first
    newer = push_backbone(tiny_folder(tmp_path / "other", 1), REPO)
    created, *commits = owned.repositories[REPO].commits
    assert owned.repositories[REPO].commits[created] == {}
    assert [first, newer] == [f"{REPO}@{commit}" for commit in commits]


def test_pipeline_is_published_with_its_configurations(owned: HubServer, tmp_path: Path):
    write_backbone(load_backbone(tiny_pipeline(tmp_path / "bare")), tmp_path / "pipeline", name="pipeline")
    pushed = push_backbone(tmp_path / "pipeline", REPO)
    sent = owned.repositories[REPO].newest
    assert {name: content for name, content in sent.items() if name != "README.md"} == files_of(tmp_path / "pipeline")
    assert load_backbone(pushed).record.name == "pipeline"


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, ["401", "hf auth login", "HF_TOKEN"]), (OTHER_TOKEN, ["403", "a token with the right to it"])],
)
def test_without_the_right_nothing_is_published(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, words: list[str]
):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UnknownNameError) as caught:
        push_backbone(folder, REPO)
    assert all(word in str(caught.value) for word in (REPO, *words))
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("missing", "damaged", "words"),
    [(RECORD_FILE, None, [RECORD_FILE, "convert or train"]), (None, WEIGHTS, [WEIGHTS, "safetensors"])],
)
def test_folder_that_is_not_whole_is_refused_before_anything_is_sent(
    owned: HubServer, folder: Path, missing: str | None, damaged: str | None, words: list[str]
):
    if missing:
        (folder / missing).unlink()
    if damaged:
        (folder / damaged).write_bytes(b"not weights")
    with pytest.raises(BackboneFileError) as caught:
        push_backbone(folder, REPO)
    assert all(word in str(caught.value) for word in words)
    assert owned.requests == []


@pytest.mark.parametrize(
    ("path", "status"), [(f"/api/models/{REPO}/preupload/*", 500), (f"/api/models/{REPO}/commit/*", 403)]
)
def test_hub_that_refuses_is_an_error_of_this_package(owned: HubServer, folder: Path, path: str, status: int):
    owned.script(path, Fault(methods=("POST",), status=status, times=ALWAYS))
    with pytest.raises(CmapError, match=REPO):
        push_backbone(folder, REPO)
