"""Backbones from a Hub that refuses, breaks, lies and moves: through the real client, in a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cmap_defense.backbones.folder import RECORD_FILE
from elsewhere import Answer, run_elsewhere
from hubserver import ALWAYS, OTHER_TOKEN, TOKEN, Fault, HubServer, serving
from tiny import files_of, fingerprint, tiny_backbone, tiny_checkpoint, tiny_folder, tiny_pipeline

MODEL, OTHER_MODEL = fingerprint(tiny_backbone(0)), fingerprint(tiny_backbone(1))
WEIGHTS, UNET = "weights.safetensors", "unet/diffusion_pytorch_model.safetensors"
CONFIG, UNET_PICKLE = "unet/config.json", "unet/diffusion_pytorch_model.bin"
UNET_HALF, UNET_SHARDS = "unet/diffusion_pytorch_model.fp16.safetensors", f"{UNET}.index.json"
CHECKPOINT = "/official/checkpoint_80"
PAGE = b"<!DOCTYPE html><html><title>Log in</title></html>"
HTML = {"Content-Type": "text/html"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"

PASSING = ["busy", "hiccup", "cut"]
STAYING = ["broken", "hangs-up", "page", "portal", "padded-page", "no-api", "no-tree", "forbidden"]
"""Repositories that hold a model, were it not for a server whose trouble passes at once, or stays for one load."""
WRONG = ["truncated", "short", "pointer", "tampered", "no-weights", "escapes", "empty"]
OTHERS = ["pipeline", "pickle", "sharded", "shard-missing", "half", "hostile", "moves", "missing", "private", "gated"]

Steps = dict[str, list[Any]]
Answers = dict[str, Answer]


class Runs:
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[HubServer]:
    """A Hub with repositories that are called after what is wrong with them; "someone/good" has two commits."""
    model, other = (files_of(tiny_folder(place / f"model{seed}", seed)) for seed in (0, 1))
    pipeline = files_of(tiny_pipeline(place / "pipeline"))
    unet = pickled(safetensors.torch.load(pipeline[UNET]))
    configurations = {name: content for name, content in pipeline.items() if name != UNET}
    tensors = safetensors.torch.load(pipeline[UNET])
    shards = in_shards(tensors)
    half = safetensors.torch.save({name: t.half() for name, t in tensors.items()})
    variants = {"unet/diffusion_pytorch_model.fp16.safetensors": b"fp16", "unet/model.fp16.bin": b"fp16"}
    with serving() as server:
        server.put(CHECKPOINT, tiny_checkpoint(0))
        good = server.repository("someone/good", model | {"README.md": b"# Good", "huge.onnx": b"0"})
        good.refs["v1"] = good.refs["main"]
        good.refs["refs/pr/1"] = good.refs["main"]
        good.commit(other)
        moves = server.repository("someone/moves", model)
        server.script("/someone/moves/resolve/*/backbone.json", Fault(afterwards=lambda: moves.commit(other)))
        server.repository("someone/private", model, private=True)
        server.repository("someone/gated", model, gated=True)
        for name in (*PASSING, *STAYING, "reset", "full", "fixed", "unfixed", "forced"):
            server.repository(f"someone/{name}", model)
        weights = f"/resolve/*/{WEIGHTS}"
        busy = {"status": 429, "headers": {"Retry-After": "1"}}
        server.script(f"/someone/busy{weights}", Fault(methods=("HEAD", "GET"), times=3, **busy))
        server.script(f"/someone/hiccup{weights}", Fault(methods=("HEAD",), status=503, times=2))
        server.script(f"/someone/broken{weights}", Fault(status=500))
        server.script(f"/someone/cut{weights}", Fault(cut=100_000), Fault(cut=10_000), Fault(hang_up=True))
        server.script(f"/someone/reset{weights}", Fault(cut=100_000, reset=True))
        server.script(f"/someone/hangs-up{weights}", Fault(hang_up=True, times=6))
        server.script("/api/models/someone/no-api*", Fault(status=200, body=PAGE, headers=HTML))
        server.script("/api/models/someone/no-tree/tree*", Fault(status=200, body=PAGE, headers=HTML))
        server.script("/api/models/someone/forbidden*", Fault(status=403, headers={"X-Error-Message": "not from here"}))
        server.script(f"/someone/forced{weights}", Fault(), Fault(methods=("HEAD",), status=500, times=ALWAYS))
        server.script(f"/someone/page{weights}", Fault(body=PAGE, headers=HTML))
        server.script("/someone/portal/resolve/*", Fault(methods=("HEAD", "GET"), status=200, body=PAGE, headers=HTML))
        padded = PAGE + b" " * (len(model[WEIGHTS]) - len(PAGE))
        server.script(f"/someone/padded-page{weights}", Fault(body=padded))
        unfixed = server.repositories["someone/unfixed"]
        server.script(f"/someone/unfixed{weights}", Fault(afterwards=lambda: unfixed.commit(other)))
        server.repository("someone/truncated", model | {WEIGHTS: model[WEIGHTS][:1000]})
        server.repository("someone/short", model | {WEIGHTS: model[WEIGHTS][:-1000]})
        server.repository("someone/pointer", model | {WEIGHTS: POINTER})
        server.repository("someone/tampered", model | {WEIGHTS: other[WEIGHTS]})
        server.repository("someone/no-weights", {RECORD_FILE: model[RECORD_FILE]})
        server.repository("someone/escapes", {RECORD_FILE: model[RECORD_FILE].replace(b'"weights.', b'"../weights.')})
        server.repository("someone/empty", {"README.md": b"# Nothing"})
        server.repository("someone/pipeline", pipeline | {UNET_PICKLE: b"not this one"} | variants)
        server.repository("someone/pickle", configurations | {UNET_PICKLE: unet} | variants)
        server.repository("someone/sharded", configurations | shards)
        server.repository("someone/shard-missing", configurations | dict(list(shards.items())[:-1]))
        server.repository("someone/half", configurations | {UNET_HALF: half})
        server.repository("someone/hostile", configurations | {UNET_PICKLE: pickled({"w": Runs(place / "executed")})})
        yield server


@pytest.fixture(scope="module")
def steps(hub: HubServer, place: Path) -> Steps:
    """What the process does, by what it is called in the tests."""
    good = hub.repositories["someone/good"]
    first = {"repo_id": "someone/good", "revision": good.refs["v1"]}
    sha256 = hashlib.sha256(good.commits[good.refs["v1"]][WEIGHTS]).hexdigest()
    return {
        "": ["hurry"],
        **{name: ["load", f"someone/{name}"] for name in (*PASSING, *STAYING, *WRONG, *OTHERS, "reset")},
        **{f"{name} again": ["load", f"someone/{name}"] for name in (*STAYING, "moves", "reset")},
        "forced": ["pull", "someone/forced"],
        "forced, broken": ["pull", "someone/forced", True],
        "forced, cached": ["load", "someone/forced"],
        **{f"fixed {n}": ["load", f"someone/fixed@{hub.repositories['someone/fixed'].refs['main']}"] for n in range(3)},
        "name unfixed": ["name", "unfixed", {"repo_id": "someone/unfixed"}],
        "unfixed": ["load", "unfixed"],
        "unfixed, known": ["entry", "unfixed"],
        "unfixed again": ["load", "unfixed"],
        "unfixed, forced": ["pull", "unfixed", True],
        "unfixed, newest": ["load", "unfixed"],
        "newest": ["load", "someone/good"],
        "tag": ["load", "someone/good@v1"],
        "commit": ["load", f"someone/good@{good.refs['v1']}"],
        "pull request": ["load", "someone/good@refs/pr/1"],
        "where": ["pull", "someone/good"],
        "force": ["pull", "someone/good", True],
        "limit": ["largest_file", 50_000],
        "full": ["load", "someone/full"],
        "no limit": ["largest_file", -1],
        "full again": ["load", "someone/full"],
        "pin": ["name", "pinned", first | {"sha256": sha256}],
        "pinned": ["load", "pinned"],
        "unpin": ["name", "pinned-wrongly", first | {"sha256": "0" * 64}],
        "pinned wrongly": ["load", "pinned-wrongly"],
        "two": ["name", "two-sources", {"repo_id": "someone/missing"}, {"url": hub.address + CHECKPOINT}],
        "two sources": ["load", "two-sources"],
        "a": ["environ", "HF_TOKEN", OTHER_TOKEN],
        "private, another's token": ["load", "someone/private"],
        "gated, another's token": ["load", "someone/gated"],
        "b": ["environ", "HF_TOKEN", "hf_noSuchToken"],
        "no such token": ["load", "someone/private"],
        "c": ["environ", "HF_TOKEN", TOKEN],
        "private, token": ["load", "someone/private"],
        "gated, token": ["load", "someone/gated"],
    }


@pytest.fixture(scope="module")
def answers(hub: HubServer, steps: Steps, place: Path) -> Answers:
    """What came of each step."""
    found = run_elsewhere(*steps.values(), home=place / "home", address=hub.address)
    return dict(zip(steps, found, strict=True))


@pytest.fixture(scope="module")
def offline(answers: Answers, hub: HubServer, place: Path) -> tuple[Answers, int]:
    """What comes of some steps when the network is forbidden, and how many requests there were nevertheless."""
    assert answers
    asked = len(hub.requests)
    revision = hub.repositories["someone/good"].refs["v1"]
    steps = {
        "newest": ["load", "someone/good"],
        "tag": ["load", "someone/good@v1"],
        "commit": ["load", f"someone/good@{revision}"],
        "pipeline": ["pull", "someone/pipeline"],
        "private": ["load", "someone/private"],
        "forced": ["pull", "someone/good", True],
        "missing": ["load", "someone/missing"],
        "other": ["load", "someone/good@v2"],
        "name": ["name", "named", {"repo_id": "someone/good", "revision": revision}],
        "named": ["load", "named"],
    }
    found = run_elsewhere(*steps.values(), home=place / "home", address=hub.address, offline=True)
    return dict(zip(steps, found, strict=True)), len(hub.requests) - asked


def check_model(answer: Answer, fingerprint: str = MODEL) -> None:
    assert answer.error == ""
    assert answer.value["fingerprint"] == fingerprint


def check_error(answer: Answer, kind: str, *words: str) -> None:
    """An error of this package, of that kind, that holds these words."""
    assert {"CmapError", kind} <= set(answer.kinds), answer
    for word in words:
        assert word in answer.error


def contents(hub: HubServer, name: str) -> list[str]:
    """The files of a repository that were fetched, in order."""
    prefix = f"/someone/{name}/resolve/"
    return [request.path.removeprefix(prefix).split("/", 1)[1] for request in hub.asked(f"{prefix}*")]


# --------------------------------------------------------------------------------------------------------------- found


def test_newest_commit_is_meant_unless_another_is_named(answers: Answers):
    check_model(answers["newest"], OTHER_MODEL)
    for named in ("tag", "commit", "pull request"):
        check_model(answers[named])


def test_files_are_kept_in_the_home_of_the_client(answers: Answers, hub: HubServer, place: Path):
    revision = hub.repositories["someone/good"].refs["main"]
    expected = place / "home" / "hub" / "models--someone--good" / "snapshots" / revision
    assert Path(answers["where"].value) == expected
    assert (expected / WEIGHTS).is_file()


@pytest.mark.usefixtures("answers")
def test_record_and_weights_are_fetched_once_per_commit_until_force_fetches_them_again(hub: HubServer):
    assert sorted(contents(hub, "good")) == sorted([RECORD_FILE, WEIGHTS] * 3)  # two commits, one of them twice


@pytest.mark.usefixtures("answers")
def test_all_files_of_a_model_come_from_one_commit_although_the_branch_moves_meanwhile(
    answers: Answers, hub: HubServer
):
    first, second = hub.repositories["someone/moves"].commits
    check_model(answers["moves"])
    check_model(answers["moves again"], OTHER_MODEL)
    commits = [request.path.split("/")[4] for request in hub.asked("/someone/moves/resolve/*")]
    assert commits == [first, first, second, second]


@pytest.mark.usefixtures("answers")
def test_nothing_is_asked_for_a_commit_that_is_there(hub: HubServer):
    assert sorted(contents(hub, "fixed")) == [RECORD_FILE, WEIGHTS]
    assert len(hub.asked("/api/models/someone/fixed*")) == 1


def test_name_without_a_commit_stands_for_the_first_that_was_fetched_until_force_fetches_the_newest(
    answers: Answers, hub: HubServer
):
    first, _ = hub.repositories["someone/unfixed"].commits
    check_model(answers["unfixed"])
    known = answers["unfixed, known"].value
    assert known["sources"][0]["revision"] == first
    assert not known["verified"], "fetched is not verified"
    check_model(answers["unfixed again"])
    assert answers["unfixed, forced"].error == ""
    check_model(answers["unfixed, newest"], OTHER_MODEL)


# ------------------------------------------------------------------------------------------------------------- refused


def test_missing_repository_is_an_unknown_name(answers: Answers):
    check_error(answers["missing"], "UnknownNameError", "'someone/missing'", "HF_TOKEN")


def test_private_repository_is_told_to_nobody_but_its_owner(answers: Answers, hub: HubServer):
    check_error(answers["private"], "UnknownNameError", "'someone/private'", "hf auth login", "HF_TOKEN")
    check_error(answers["private, another's token"], "UnknownNameError", "'someone/private'", "HF_TOKEN")
    check_model(answers["private, token"])
    assert {request.token for request in hub.asked("/someone/private/resolve/*")} == {TOKEN}


def test_token_that_the_hub_does_not_know_is_named_as_the_reason(answers: Answers):
    check_error(answers["no such token"], "UnknownNameError", "someone/private", "401", "HF_TOKEN")


def test_gated_repository_says_that_its_terms_are_to_be_accepted(answers: Answers):
    for token in ("gated", "gated, another's token"):
        check_error(answers[token], "UnknownNameError", "someone/gated is gated", "accept its terms", "HF_TOKEN")
    check_model(answers["gated, token"])


# -------------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("name", PASSING)
def test_trouble_that_passes_is_not_noticed(answers: Answers, name: str):
    check_model(answers[name])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", ["500"]),
        ("hangs-up", []),
        ("page", ["file should be of size"]),
        ("portal", ["HF_ENDPOINT"]),
        ("no-api", ["HF_ENDPOINT"]),
        ("no-tree", ["HF_ENDPOINT"]),
        ("full", ["room on the disk"]),
    ],
)
def test_trouble_that_stays_is_a_file_error_that_says_what_it_was(answers: Answers, name: str, words: list[str]):
    check_error(answers[name], "BackboneFileError", f"someone/{name}", *words)


@pytest.mark.parametrize("name", [*STAYING, "full"])
def test_trouble_leaves_nothing_that_is_in_the_way_of_the_next_load(answers: Answers, name: str):
    assert answers[name].error
    check_model(answers[f"{name} again"])


def test_connection_that_is_reset_does_no_harm_whether_the_client_tries_again_or_not(answers: Answers):
    if answers["reset"].error:
        check_error(answers["reset"], "BackboneFileError", "someone/reset")
    check_model(answers["reset again"])


def test_address_that_is_barred_is_a_refusal(answers: Answers):
    check_error(answers["forbidden"], "UnknownNameError", "someone/forbidden", "403", "not from here", "HF_TOKEN")


def test_force_that_fails_is_an_error_and_the_cache_serves_as_before(answers: Answers):
    assert answers["forced"].error == ""
    check_error(answers["forced, broken"], "BackboneFileError", "someone/forced")
    check_model(answers["forced, cached"])


# --------------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("padded-page", ["SHA-256"]),
        ("truncated", ["not a whole safetensors file"]),
        ("short", ["not a whole safetensors file"]),
        ("pointer", ["Git LFS pointer"]),
        ("tampered", ["SHA-256", "not the file that the record describes"]),
        ("no-weights", [f"There is no {WEIGHTS}", "lacks its weights"]),
        ("escapes", ["weights_file"]),
        ("empty", ["someone/empty holds no backbone", RECORD_FILE, "model_index.json"]),
    ],
)
def test_wrong_file_is_refused_and_the_reason_is_told(answers: Answers, name: str, words: list[str]):
    check_error(answers[name], "BackboneFileError", *words)


@pytest.mark.usefixtures("answers")
def test_nothing_outside_the_repository_is_asked_for(hub: HubServer):
    assert contents(hub, "escapes") == [RECORD_FILE]


@pytest.mark.usefixtures("answers")
def test_repository_without_a_model_is_not_fetched(hub: HubServer):
    assert contents(hub, "empty") == []


def test_checksum_of_the_entry_is_demanded_besides_that_of_the_record(answers: Answers):
    check_model(answers["pinned"])
    check_error(answers["pinned wrongly"], "BackboneFileError", "SHA-256", "0" * 64)


def test_second_source_is_used_where_the_first_is_missing(answers: Answers):
    check_model(answers["two sources"])
    assert "someone/missing cannot be used" in answers["two sources"].err
    assert "trying the next source" in answers["two sources"].err


# ----------------------------------------------------------------------------------------------------------- pipelines


def test_pipeline_is_fetched_without_what_it_does_not_need(answers: Answers, hub: HubServer):
    assert answers["pipeline"].value["name"] == "someone/pipeline"
    assert sorted(contents(hub, "pipeline")[:-1]) == ["model_index.json", "scheduler/scheduler_config.json", CONFIG]
    assert contents(hub, "pipeline")[-1] == UNET


def test_pickle_is_fetched_only_where_there_is_nothing_better(answers: Answers, hub: HubServer):
    check_model(answers["pickle"], answers["pipeline"].value["fingerprint"])
    assert contents(hub, "pickle")[-1] == UNET_PICKLE


def test_shards_are_fetched_with_their_index(answers: Answers, hub: HubServer):
    check_model(answers["sharded"], answers["pipeline"].value["fingerprint"])
    fetched = contents(hub, "sharded")
    assert fetched[-3] == UNET_SHARDS
    assert all("-of-00002" in name for name in fetched[-2:])


def test_shard_that_a_repository_lacks_is_named(answers: Answers):
    check_error(answers["shard-missing"], "BackboneFileError", "someone/shard-missing", "00002-of-00002.safetensors")


def test_variant_is_fetched_where_there_is_nothing_better(answers: Answers, hub: HubServer):
    assert answers["half"].error == ""
    assert answers["half"].value["fingerprint"] != answers["pipeline"].value["fingerprint"]
    assert contents(hub, "half")[-1] == UNET_HALF


def test_pickle_that_wants_to_run_code_is_refused_and_does_not(answers: Answers, place: Path):
    check_error(answers["hostile"], "BackboneFileError", "refused", "Nothing of it was executed")
    assert not (place / "executed").exists()


# ------------------------------------------------------------------------------------------------------------- offline


def test_offline_the_cache_serves_without_a_request(offline: tuple[Answers, int]):
    found, asked = offline
    check_model(found["newest"], OTHER_MODEL)
    for name in ("tag", "commit", "private", "named"):
        check_model(found[name])
    assert (Path(found["pipeline"].value) / UNET).is_file()
    assert asked == 0


@pytest.mark.parametrize("name", ["missing", "other", "forced"])
def test_offline_what_the_cache_lacks_is_an_error_that_names_the_switch(offline: tuple[Answers, int], name: str):
    check_error(offline[0][name], "BackboneFileError", "someone/", "HF_HUB_OFFLINE")
