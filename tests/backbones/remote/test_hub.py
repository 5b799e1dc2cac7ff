"""Backbones from a Hub that works, refuses, breaks, lies and moves, through the real client."""

import hashlib
import io
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from cmap_defense.backbones import HubRepository, RegistryEntry, register, registry_entry
from cmap_defense.backbones.folder import RECORD_FILE
from cmap_defense.backbones.load import load_backbone, resolve_backbone
from cmap_defense.backbones.remote.cache import pinned
from cmap_defense.errors import BackboneFileError, CmapError, UnknownNameError
from hubserver import ALWAYS, OTHER_TOKEN, TOKEN, Fault, HubServer, Repository, connect_client
from tiny import fingerprint, tiny_backbone, tiny_checkpoint, tiny_entry, tiny_file

REPO, WEIGHTS = "someone/model", "weights.safetensors"
MODEL, OTHER_MODEL = fingerprint(tiny_backbone(0)), fingerprint(tiny_backbone(1))
UNET, CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
UNET_PICKLE, UNET_HALF = "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"
UNET_SHARDS = f"{UNET}.index.json"
WEIGHTS_PATH, API_PATH = f"/{REPO}/resolve/*/{WEIGHTS}", f"/api/models/{REPO}"
PAGE, HTML = b"<!DOCTYPE html><html><title>Log in</title></html>", {"Content-Type": "text/html"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.fixture
def repository(hub: HubServer, model_files: list[dict[str, bytes]]) -> Repository:
    """A repository with a backbone folder, in which there are files that nobody should fetch."""
    return hub.repository(REPO, model_files[0] | {"README.md": b"# Good", "huge.onnx": b"0"})


def name_of(source: HubRepository, name: str = "named") -> RegistryEntry:
    """Register a name for a repository."""
    entry = tiny_entry(name, source)
    register(entry, replace=True)
    return entry


def fetched(hub: HubServer, repo_id: str = REPO) -> list[str]:
    """The files of a repository that were fetched, in order."""
    prefix = f"/{repo_id}/resolve/"
    return [request.path.removeprefix(prefix).split("/", 1)[1] for request in hub.requests_for(f"{prefix}*")]


def check_model(source: str = REPO, expected: str = MODEL) -> None:
    assert fingerprint(load_backbone(source)) == expected


def check_error(kind: type[Exception], *words: str, source: str = REPO) -> None:
    with pytest.raises(kind) as caught:
        load_backbone(source)
    assert isinstance(caught.value, CmapError)
    for word in (source.partition("@")[0], *words):
        assert word in str(caught.value)


def test_newest_commit_is_meant_unless_another_is_named(
    hub: HubServer, repository: Repository, model_files: list[dict[str, bytes]], tmp_path: Path
) -> None:
    first = repository.refs["main"]
    repository.refs |= {"v1": first, "refs/pr/1": first}
    newest = repository.commit(model_files[1])
    check_model(expected=OTHER_MODEL)
    for revision in ("v1", first, "refs/pr/1"):
        check_model(f"{REPO}@{revision}")
    assert resolve_backbone(REPO) == tmp_path / "home" / "hub" / "models--someone--model" / "snapshots" / newest


def test_record_and_weights_alone_are_fetched_and_once_until_force_fetches_them_again(
    hub: HubServer, repository: Repository
) -> None:
    for source in (REPO, REPO, f"{REPO}@{repository.refs['main']}"):
        check_model(source)
    assert sorted(fetched(hub)) == [RECORD_FILE, WEIGHTS]
    resolve_backbone(REPO, force=True)
    assert sorted(fetched(hub)) == sorted([RECORD_FILE, WEIGHTS] * 2)


def test_all_files_come_from_one_commit_although_the_branch_moves_meanwhile(
    hub: HubServer, repository: Repository, model_files: list[dict[str, bytes]]
) -> None:
    hub.script(f"/{REPO}/resolve/*/{RECORD_FILE}", Fault(afterwards=lambda: repository.commit(model_files[1])))
    check_model()
    check_model(expected=OTHER_MODEL)
    first, second = repository.commits
    commits = [request.path.split("/")[4] for request in hub.requests_for(f"/{REPO}/resolve/*")]
    assert commits == [first, first, second, second]


def test_commit_in_the_cache_needs_no_request(hub: HubServer, repository: Repository) -> None:
    source = f"{REPO}@{repository.refs['main']}"
    check_model(source)
    requests = len(hub.requests)
    check_model(source)
    assert len(hub.requests) == requests


def test_name_without_a_commit_stands_for_the_first_that_was_fetched_until_force_fetches_the_newest(
    hub: HubServer, repository: Repository, model_files: list[dict[str, bytes]]
) -> None:
    name_of(HubRepository(repo_id=REPO))
    first = repository.refs["main"]
    check_model("named")
    repository.commit(model_files[1])
    known = pinned(registry_entry("named"))
    assert getattr(known.sources[0], "revision", None) == first
    assert not known.verified, "fetched is not verified"
    check_model("named")
    resolve_backbone("named", force=True)
    check_model("named", OTHER_MODEL)


def test_checksum_of_the_entry_is_required_besides_that_of_the_record(
    repository: Repository, model_files: list[dict[str, bytes]]
) -> None:
    sha256, commit = hashlib.sha256(model_files[0][WEIGHTS]).hexdigest(), repository.refs["main"]
    name_of(HubRepository(repo_id=REPO, revision=commit, sha256=sha256))
    check_model("named")
    name_of(HubRepository(repo_id=REPO, revision=commit, sha256="0" * 64))
    with pytest.raises(BackboneFileError, match=f"SHA-256.*{'0' * 64}"):
        load_backbone("named")


def test_second_source_is_used_where_the_first_is_missing(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_file(hub.put("/checkpoint_80", tiny_checkpoint(0)))
    register(tiny_entry("two-sources", HubRepository(repo_id="someone/missing"), checkpoint))
    check_model("two-sources")
    printed = capsys.readouterr().err
    assert "someone/missing cannot be used" in printed
    assert "trying the next source" in printed


def test_missing_repository_and_revision_are_unknown_names(repository: Repository) -> None:
    check_error(UnknownNameError, "'someone/missing'", "HF_TOKEN", source="someone/missing")
    check_error(UnknownNameError, "'no-such-revision'", source=f"{REPO}@no-such-revision")
    assert issubclass(UnknownNameError, LookupError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"private": True}, [f"'{REPO}'", "hf auth login", "HF_TOKEN"]),
        ({"gated": True}, [f"{REPO} is gated", "accept its terms", "HF_TOKEN"]),
    ],
)
def test_repository_that_is_not_public_needs_the_owners_token(
    hub: HubServer,
    model_files: list[dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, bool],
    words: list[str],
) -> None:
    hub.repository(REPO, model_files[0], **options)
    check_error(UnknownNameError, *words)
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    check_error(UnknownNameError, words[0], "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_noSuchToken")
    check_error(UnknownNameError, "401", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_model()
    assert {request.token for request in hub.requests_for(WEIGHTS_PATH)} == {TOKEN}


BUSY = Fault(methods=("HEAD", "GET"), times=3, status=429, headers={"Retry-After": "1"})
PASSING = {
    "busy": [BUSY],
    "hiccup": [Fault(methods=("HEAD",), status=503, times=2)],
    "cut": [Fault(cut=100_000), Fault(cut=10_000), Fault(hang_up=True)],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
@pytest.mark.usefixtures("repository")
def test_trouble_that_passes_is_not_noticed(hub: HubServer, faults: list[Fault]) -> None:
    hub.script(WEIGHTS_PATH, *faults)
    check_model()


STAYING: dict[str, tuple[str, Fault, list[str]]] = {
    "broken": (WEIGHTS_PATH, Fault(status=500), ["500"]),
    "out of order": (f"{API_PATH}*", Fault(status=500, times=30), ["500"]),
    "hangs up": (WEIGHTS_PATH, Fault(hang_up=True, times=6), []),
    "hangs up from the start": (f"{API_PATH}*", Fault(hang_up=True, times=30), []),
    "page": (WEIGHTS_PATH, Fault(body=PAGE, headers=HTML), ["file should be of size"]),
    "portal": (
        f"/{REPO}/resolve/*",
        Fault(methods=("HEAD", "GET"), status=200, body=PAGE, headers=HTML),
        ["HF_ENDPOINT"],
    ),
    "no API": (f"{API_PATH}*", Fault(status=200, body=PAGE, headers=HTML), ["HF_ENDPOINT"]),
    "no list of files": (f"{API_PATH}/tree*", Fault(status=200, body=PAGE, headers=HTML), ["HF_ENDPOINT"]),
}


@pytest.mark.parametrize(("path", "fault", "words"), STAYING.values(), ids=STAYING.keys())
@pytest.mark.usefixtures("repository")
def test_trouble_that_stays_is_a_file_error_that_gives_the_reason_and_the_next_load_works(
    hub: HubServer, path: str, fault: Fault, words: list[str]
) -> None:
    hub.script(path, fault)
    check_error(BackboneFileError, *words)
    hub.script(path)
    check_model()


@pytest.mark.usefixtures("repository")
def test_address_that_is_barred_is_a_refusal(hub: HubServer) -> None:
    hub.script(f"{API_PATH}*", Fault(status=403, headers={"X-Error-Message": "not from here"}))
    check_error(UnknownNameError, "403", "not from here", "HF_TOKEN")
    check_model()


@pytest.mark.usefixtures("repository")
def test_force_that_fails_is_an_error_and_the_cache_serves_as_before(hub: HubServer) -> None:
    resolve_backbone(REPO)
    hub.script(WEIGHTS_PATH, Fault(methods=("HEAD", "GET"), status=500, times=ALWAYS))
    with pytest.raises(BackboneFileError, match=REPO):
        resolve_backbone(REPO, force=True)
    check_model()


@pytest.fixture
def small_disk() -> Iterator[Callable[[], None]]:
    """The system refuses to write files beyond 50 kB, as a full disk would, until the function is called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    def end() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield end
    end()


@pytest.mark.usefixtures("repository")
def test_full_disk_is_named_and_does_no_harm(small_disk: Callable[[], None]) -> None:
    check_error(BackboneFileError, "space on the disk")
    small_disk()
    check_model()


def record_changed(files: dict[str, bytes], old: bytes, new: bytes) -> dict[str, bytes]:
    return files | {RECORD_FILE: files[RECORD_FILE].replace(old, new)}


WRONG: dict[str, tuple[Callable[[dict[str, bytes], dict[str, bytes]], dict[str, bytes]], list[str]]] = {
    "truncated": (lambda files, _: files | {WEIGHTS: files[WEIGHTS][:1000]}, ["not a whole safetensors file"]),
    "short": (lambda files, _: files | {WEIGHTS: files[WEIGHTS][:-1000]}, ["not a whole safetensors file"]),
    "pointer": (lambda files, _: files | {WEIGHTS: POINTER}, ["Git LFS pointer"]),
    "other weights": (
        lambda files, other: files | {WEIGHTS: other[WEIGHTS]},
        ["SHA-256", "not the file that the record describes"],
    ),
    "no weights": (
        lambda files, _: {RECORD_FILE: files[RECORD_FILE]},
        [REPO, f"There is no {WEIGHTS}", "lacks its weights"],
    ),
    "weights elsewhere": (lambda files, _: record_changed(files, b'"weights.', b'"../weights.'), ["weights_file"]),
    "empty": (lambda *_: {"README.md": b"# Nothing"}, [f"{REPO} holds no backbone", RECORD_FILE, "model_index.json"]),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_file_is_refused_with_the_reason(
    hub: HubServer, model_files: list[dict[str, bytes]], change: Any, words: list[str]
) -> None:
    files = change(*model_files)
    hub.repository(REPO, files)
    with pytest.raises(BackboneFileError) as caught:
        load_backbone(REPO)
    for word in words:
        assert word in str(caught.value)
    assert set(fetched(hub)) <= {RECORD_FILE, WEIGHTS} & files.keys()
    if b'"../' in files.get(RECORD_FILE, b""):
        assert fetched(hub) == [RECORD_FILE], "nothing outside the repository is fetched"


@pytest.mark.usefixtures("repository")
def test_file_of_the_right_size_and_other_content_is_refused_and_not_kept(
    hub: HubServer, model_files: list[dict[str, bytes]]
) -> None:
    hub.script(WEIGHTS_PATH, Fault(body=PAGE + b" " * (len(model_files[0][WEIGHTS]) - len(PAGE))))
    with pytest.raises(BackboneFileError, match="SHA-256"):
        load_backbone(REPO)
    check_model()


class RunsCode:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def in_shards(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """An index, and two shards with the tensors by turns."""
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {tensor: names[number % 2] for number, tensor in enumerate(tensors)}
    parts = [{tensor: tensors[tensor] for tensor in tensors if places[tensor] == name} for name in names]
    files = {f"unet/{name}": safetensors.torch.save(part) for name, part in zip(names, parts, strict=True)}
    return {UNET_SHARDS: json.dumps({"metadata": {}, "weight_map": places}).encode()} | files


@pytest.mark.parametrize("form", ["safetensors", "pickle", "shards", "half"])
def test_pipeline_is_fetched_in_its_best_form_and_without_what_it_does_not_need(
    hub: HubServer, pipeline_files: dict[str, bytes], form: str
) -> None:
    tensors = safetensors.torch.load(pipeline_files[UNET])
    configurations = {name: content for name, content in pipeline_files.items() if name != UNET}
    half = {UNET_HALF: safetensors.torch.save({name: t.half() for name, t in tensors.items()})}
    pickle = {UNET_PICKLE: pickled(tensors), "unet/model.fp16.bin": b"fp16", UNET_HALF: b"not this one"}
    forms: dict[str, tuple[dict[str, bytes], list[str]]] = {
        "safetensors": (pipeline_files | {UNET_PICKLE: b"not this one"} | half, [UNET]),
        "pickle": (pickle, [UNET_PICKLE]),
        "shards": (in_shards(tensors), [UNET_SHARDS, *(name for name in in_shards(tensors) if name != UNET_SHARDS)]),
        "half": (half, [UNET_HALF]),
    }
    files, expected = forms[form]
    hub.repository("someone/pipeline", configurations | files)
    backbone = load_backbone("someone/pipeline")
    assert backbone.record.name == "someone/pipeline"
    for name, tensor in backbone.network.unet.state_dict().items():
        assert torch.equal(tensor, tensors[name].half().float() if form == "half" else tensors[name])
    described = ["model_index.json", "scheduler/scheduler_config.json", CONFIG]
    names = fetched(hub, "someone/pipeline")
    assert sorted(names[:3]) == sorted(described)
    assert sorted(names[3:]) == sorted(expected)
    assert names[3] == expected[0], "the index comes before its shards"


def test_pickle_that_wants_to_run_code_is_refused_and_does_not(
    hub: HubServer, pipeline_files: dict[str, bytes], tmp_path: Path
) -> None:
    configurations = {name: content for name, content in pipeline_files.items() if name != UNET}
    hub.repository(REPO, configurations | {UNET_PICKLE: pickled({"w": RunsCode(tmp_path / "executed")})})
    with pytest.raises(BackboneFileError, match=r"refused.*Nothing of it was executed"):
        load_backbone(REPO)
    assert not (tmp_path / "executed").exists()


def test_without_a_network_the_cache_serves_and_what_it_lacks_names_the_variable(
    hub: HubServer,
    repository: Repository,
    pipeline_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = repository.refs["v1"] = repository.refs["main"]
    hub.repository("someone/pipeline", pipeline_files)
    name_of(HubRepository(repo_id=REPO, revision=commit))
    sources = (REPO, f"{REPO}@v1", f"{REPO}@{commit}", "named", "someone/pipeline")
    for source in sources:
        resolve_backbone(source)
    requests = len(hub.requests)
    for offline in (False, True):
        connect_client(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")  # nobody listens there
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for source in sources:
            assert load_backbone(source).image_shape == (3, 8, 8)
        for source in ("someone/missing", f"{REPO}@v2"):
            check_error(BackboneFileError, "HF_HUB_OFFLINE", source=source)
        with pytest.raises(BackboneFileError, match="HF_HUB_OFFLINE"):
            resolve_backbone(REPO, force=True)
    assert len(hub.requests) == requests


@pytest.mark.usefixtures("repository")
def test_offline_weights_that_the_cache_lacks_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_backbone(REPO, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_error(BackboneFileError, "HF_HUB_OFFLINE")
