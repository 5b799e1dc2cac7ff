"""``cmap-defense backbones``: list, info, pull, convert, verify, push."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from cmap_defense import load_backbone
from cmap_defense.backbones import EDMDenoiser
from cmap_defense.backbones.folder import RECORD_FILE, read_record
from cmap_defense.backbones.ncsnpp import NCSNppConfig
from cmap_defense.backbones.registry import backbone_names, register, registry_entry
from cmap_defense.cli.backbones import _config
from cmap_defense.cli.options import Pair
from goldens import FOLDER
from hubserver import TOKEN, HubServer, connect_client, serving
from tiny import CONFIG, files_of, fingerprint, own_names, tiny_backbone, tiny_checkpoint, tiny_entry, tiny_file
from tiny import tiny_folder as write_folder

from .conftest import Run

NAME, PATH, WEIGHTS = "tiny-cd", "/models/checkpoint_80", "weights.safetensors"
CHECKPOINT, MODEL = tiny_checkpoint(), fingerprint(tiny_backbone())
TINY = ["nf=8", "ch_mult=1,2", "num_res_blocks=1", "attn_resolutions=4,", "image_size=8"]
TINY_OPTIONS = [word for change in TINY for word in ("--config", change)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, a network, names of one's own, and an empty folder to work in."""
    monkeypatch.setenv("CMAP_DEFENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with own_names():
        yield tmp_path / "cache"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server with a checkpoint, which has its name."""
    with serving() as server:
        register(tiny_entry(NAME, tiny_file(server.put(PATH, CHECKPOINT))))
        yield server


@pytest.fixture
def checkpoint() -> str:
    """A checkpoint in the working folder."""
    Path("checkpoint_80").write_bytes(CHECKPOINT)
    return "checkpoint_80"


@pytest.fixture
def folder() -> str:
    """A backbone folder in the working folder."""
    return str(write_folder(Path("model"), licence="CC0", settings={"n_latents": 2}))


@pytest.fixture
def backbones(run: Run) -> Run:
    """Runs a command of the group."""
    return lambda *words, **status: run("backbones", *words, **status)


@pytest.fixture
def values(backbones: Run) -> Callable[..., Any]:
    """Runs a command of the group and returns what it prints as JSON."""
    return lambda *words: json.loads(backbones(*words, "--json"))


Values = Callable[..., Any]


def test_list_shows_all_names_and_whether_they_are_verified(backbones: Run, values: Values):
    lines = backbones("list").splitlines()
    assert lines[0].split()[:5] == ["name", "kind", "image", "classes", "verified"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:] if line and ":" not in line.split()[0]}
    assert sorted(rows) == backbone_names()
    assert rows["fashion-mnist-ct"][:4] == ["consistency", "1x28x28", "-", "yes"]
    assert rows["cifar10-cd"][:4] == ["consistency", "3x32x32", "-", "no"]
    assert rows["imagenet64-cd"][1:3] == ["3x64x64", "1000"]
    assert "backbones verify" in lines[-1]
    assert values("list") == [registry_entry(name).to_dict() for name in backbone_names()]


def test_info_of_a_name_fetches_nothing(hub: HubServer, cache: Path, backbones: Run, values: Values):
    assert values("info", NAME) == registry_entry(NAME).to_dict()
    lines = backbones("info", NAME).splitlines()
    assert hub.requests == []
    assert not cache.exists()
    expected = {f"name: {NAME}", "kind: consistency", "image_shape: 3, 8, 8", "licence: CC0", "verified: no"}
    assert expected | {f"  url: {hub.address}{PATH}"} <= set(lines)


def test_info_of_a_folder_is_its_record(folder: str, backbones: Run, values: Values):
    record = json.loads(read_record(folder).to_json())
    assert values("info", folder) == record | {"folder": folder}
    assert {f"weights_sha256: {record['weights_sha256']}", "  n_latents: 2"} <= set(
        backbones("info", f"./{folder}").splitlines()
    )


def test_pull_fetches_once_and_force_again(hub: HubServer, cache: Path, backbones: Run, values: Values):
    text = backbones("pull", NAME)
    assert f"{NAME} is in {cache / 'converted'}" in text
    assert "MiB of weights" in text
    found = values("pull", NAME)
    assert len(hub.requests_for()) == 1
    assert backbones("pull", NAME, "--force") == text
    assert len(hub.requests_for()) == 2
    weights = Path(found["weights"])
    assert (found["backbone"], weights) == (NAME, Path(found["folder"]) / WEIGHTS)
    assert weights.stat().st_size == found["bytes"]
    assert fingerprint(load_backbone(found["folder"])) == MODEL
    weights.write_bytes(weights.read_bytes()[:-1])
    assert WEIGHTS in backbones("verify", NAME, status=1)
    backbones("pull", NAME, "--force")
    assert fingerprint(load_backbone(NAME)) == MODEL


def test_convert_writes_a_folder_that_loads(checkpoint: str, backbones: Run):
    text = backbones("convert", checkpoint, "out/mine", "--from", "jcm", *TINY_OPTIONS)
    assert f"out/mine/{WEIGHTS}" in text
    assert "load_backbone('out/mine')" in text
    assert sorted(path.name for path in Path("out/mine").iterdir()) == [RECORD_FILE, WEIGHTS]
    backbone = load_backbone("./out/mine")
    assert fingerprint(backbone) == MODEL
    assert backbone.record is not None
    assert backbone.record.name == "mine"
    assert backbone.record.source == {
        "file": "checkpoint_80",
        "converter": "jcm",
        "params": "params_ema",
        "size": len(CHECKPOINT),
        "sha256": hashlib.sha256(CHECKPOINT).hexdigest(),
    }


def test_convert_writes_a_denoiser_in_another_precision_with_a_description(checkpoint: str, values: Values):
    words = ["--name", "my model", "--description", "Of mine.", "--licence", "CC0-1.0", "--kind", "denoiser"]
    found = values("convert", checkpoint, "out", "--from", "jcm", *TINY_OPTIONS, *words, "--weights", "bfloat16")
    assert found == json.loads(read_record("out").to_json()) | {"folder": "out"}
    assert (found["name"], found["description"], found["licence"]) == ("my model", "Of mine.", "CC0-1.0")
    assert (found["kind"], found["weights_dtype"]) == ("denoiser", "bfloat16")
    assert type(load_backbone("./out")) is EDMDenoiser


def config(*changes: str) -> NCSNppConfig:
    return _config([Pair().convert(change, None, None) for change in changes])


def test_config_takes_numbers_truth_values_and_lists():
    changes = ("nf=64", "ch_mult=1,2", "attn_resolutions=8", "skip_rescale=False", "dropout=0.1", "fir_kernel=1,2,2,1")
    assert config(*changes) == NCSNppConfig(
        nf=64, ch_mult=(1, 2), attn_resolutions=(8,), skip_rescale=False, dropout=0.1, fir_kernel=(1.0, 2.0, 2.0, 1.0)
    )
    assert config("attn_resolutions=").attn_resolutions == ()
    assert config(*TINY) == CONFIG
    assert config() == NCSNppConfig()


JCM = "checkpoint_80 out --from jcm"
MISTAKES = [
    (f"{JCM} --config nf", 2, "KEY=VALUE"),
    (f"{JCM} --config nf=many", 2, "many"),
    (f"{JCM} --config nf=", 2, "nf must be an integer, but is ''"),
    (f"{JCM} --config nf=7", 2, "multiple of 4"),
    (f"{JCM} --config nf=8.5", 2, "integer"),
    (f"{JCM} --config nf=true", 2, "integer"),
    (f"{JCM} --config ch_mult=", 2, "ch_mult"),
    (f"{JCM} --config ch_mult=1;2", 2, "ch_mult"),
    (f"{JCM} --config num_blocks=1", 2, "num_res_blocks"),
    (f"{JCM} --config skip_rescale=1", 2, "skip_rescale"),
    (f"{JCM} --config =3", 2, "KEY=VALUE"),
    ("missing out --from jcm", 2, "missing"),
    ("checkpoint_80 out", 2, "--from"),
    ("checkpoint_80 out --from pickle", 2, "pickle"),
    ("checkpoint_80 checkpoint_80 --from jcm", 2, "checkpoint_80"),
    ("checkpoint_80 checkpoint_80/below --from jcm", 2, "cannot be written to"),
    (f"{JCM} --weights float64", 2, "float64"),
    (f"{JCM} --kind flow", 2, "flow"),
    (f"{JCM} --image-size 8", 2, "--config image_size"),
    ("checkpoint_80 out --from openai --config nf=8", 2, "--config"),
    ("checkpoint_80 out --from openai --image-size 0", 2, "--image-size"),
    ("checkpoint_80 out --from openai --params params_ema", 2, "--params: goes with --from jcm"),
    (f"{JCM} --head-channels 8", 2, "--head-channels: goes with --from openai"),
    (f"{JCM} TINY --params param_ema", 1, "'params_ema'"),
    (f"{JCM} TINY --config nf=16", 1, "does not fit this config"),
    ("garbage out --from jcm TINY", 1, "not a flax msgpack checkpoint"),
    ("short out --from jcm TINY", 1, "ends in the middle"),
    ("garbage out --from openai --image-size 8", 1, "garbage"),
    ("checkpoint_80 out --from openai", 1, "--image-size"),
]


@pytest.mark.parametrize(("line", "status", "word"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
@pytest.mark.usefixtures("checkpoint")
def test_mistakes_in_convert_get_a_message_a_status_and_no_folder(backbones: Run, line: str, status: int, word: str):
    Path("garbage").write_bytes(b"garbage")
    Path("short").write_bytes(CHECKPOINT[:50_000])
    given = [option for part in line.split() for option in (TINY_OPTIONS if part == "TINY" else [part])]
    assert word in backbones("convert", *given, status=status)
    assert not Path("out").exists()


def test_convert_reads_openais_files(values: Values):
    (file,) = (FOLDER / "openai_tiny").glob("*.pt")
    options = ["--from", "openai", "--image-size", "32", "--head-channels", "16"]
    found = values("convert", str(file), "out", *options)
    assert (found["image_shape"], found["num_classes"]) == ([3, 32, 32], 1000)
    assert found["source"]["converter"] == "openai"
    assert found["source"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    images = load_backbone("./out").generate(torch.zeros(2, 3, 32, 32), torch.tensor([1, 2]))
    assert images.shape == (2, 3, 32, 32)
    assert not torch.equal(images[0], images[1]), "the class matters"


@pytest.mark.usefixtures("hub")
def test_verify_notes_what_it_finds_and_list_and_info_show_it(cache: Path, backbones: Run, values: Values):
    text = backbones("verify", NAME).splitlines()
    assert f"official_sha256: {hashlib.sha256(CHECKPOINT).hexdigest()}" in text
    assert f"pinned: {cache / 'verified.json'}" in text
    assert text[-1] == f"{NAME} is whole and works."
    (row,) = [line.split() for line in backbones("list").splitlines() if line.startswith(NAME)]
    assert (row[1], row[4]) == ("consistency", "yes")
    assert values("info", NAME)["verified"] is True
    assert values("verify", NAME)["boundary_error"] == 0


@pytest.mark.parametrize("command", ["verify", "info", "pull"])
@pytest.mark.parametrize(
    ("source", "word"), [("tiny-cdd", "'tiny-cd'"), ("./nowhere", "nowhere"), ("a/b/c", "a/b/c"), ("", "empty")]
)
@pytest.mark.usefixtures("hub")
def test_what_is_not_there_is_an_error(backbones: Run, command: str, source: str, word: str):
    assert word in backbones(command, source, status=1)


@pytest.mark.parametrize(("damage", "word"), [(b"", WEIGHTS), (b"<html>", "web page"), (None, WEIGHTS)])
def test_verify_names_the_damage_of_a_folder(folder: str, backbones: Run, damage: bytes | None, word: str):
    (Path(folder) / WEIGHTS).unlink()
    if damage is not None:
        (Path(folder) / WEIGHTS).write_bytes(damage)
    assert word in backbones("verify", folder, status=1)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of the client's own upload
def test_commands_that_use_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, backbones: Run, values: Values
):
    with serving() as org:
        connect_client(monkeypatch, org.address, tmp_path / "home")
        org.repository("someone/model", files_of(Path(folder)))
        commit = org.repositories["someone/model"].refs["main"]
        assert values("info", "someone/model")["name"] == "tiny"
        assert [request.path.split("/")[-1] for request in org.requests_for("*/resolve/*")] == [RECORD_FILE]
        assert commit in backbones("pull", "someone/model")
        found = values("pull", "someone/model")
        assert Path(found["weights"]).stat().st_size == found["bytes"]
        assert values("verify", "someone/model")["revision"] == commit
        assert "hf auth login" in backbones("push", folder, "someone/new", status=1)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        backbones("push", folder, "someone/new", "--private", "--message", "My words")
        new = org.repositories["someone/new"]
        assert new.private
        assert new.messages[-1] == "My words"
        newer = values("push", folder, "someone/newer")
        assert newer == {"backbone": f"someone/newer@{org.repositories['someone/newer'].refs['main']}"}
        assert "HF_TOKEN" in backbones("pull", "someone/missing", status=1)
        assert RECORD_FILE in backbones("push", str(tmp_path), "someone/nowhere", status=1)
