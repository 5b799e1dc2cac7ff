"""From what a user writes to a backbone: a folder, a path, a name, a Hub id.

The Hub is a server on the loopback device (``hubserver``), to which the real client talks in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cmap_defense.backbones.folder import RECORD_FILE, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.load import load_backbone, resolve_backbone
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import BackboneFileError, CmapError, UnknownNameError
from elsewhere import NOWHERE, Answer, run_elsewhere
from hubserver import ALWAYS, Fault, HubServer, serving
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


# ---------------------------------------------------------------------------------------------------- local sources


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


def test_dtype_is_that_of_the_weights(folder: Path):
    assert {p.dtype for p in load_backbone(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


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


# ---------------------------------------------------------------------------------------------------------- the Hub

MISSING, GATED, BROKEN, HANGING = (f"someone/{name}" for name in ("no-such-model", "gated", "out-of-order", "hangs-up"))
NO_REVISION = f"{REPO}@no-such-revision"
FILES = (RECORD_FILE, "weights.safetensors", "huge.bin")
Answers = dict[str, Answer]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with a backbone folder, in which there is a file that nobody should fetch, and some broken repositories."""
    folder = write_toy(tmp_path_factory.mktemp("hub") / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"huge.bin": b"0" * 100}
    with serving() as server:
        repository = server.repository(REPO, files)
        repository.refs["v1"] = repository.refs["main"]
        server.repository(GATED, files, gated=True)
        server.script(f"/api/models/{BROKEN}*", Fault(times=ALWAYS, status=500))
        server.script(f"/api/models/{HANGING}*", Fault(times=ALWAYS, hang_up=True))
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's cache, which the processes of this file share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub: HubServer, cache: Path) -> Answers:
    """What came of each source while the Hub was there; the repository twice, then what the Hub refuses."""
    sources = (REPO, f"{REPO}@v1", MISSING, NO_REVISION, GATED, BROKEN, HANGING)
    answers = run_elsewhere(*[("load", source) for source in sources], home=cache, address=hub.address)
    return dict(zip(sources, answers, strict=True))


def check_found(answer: Answer) -> None:
    """The answer is the repository's model."""
    assert answer.error == ""
    assert (answer.value["name"], answer.value["shape"]) == ("toy", list(CONFIG.image_shape))


def check_kinds(answer: Answer, *kinds: str) -> None:
    """The answer is an error of this package and of these kinds."""
    assert {"CmapError", *kinds} <= set(answer.kinds), answer


def test_hub_id_is_fetched_and_loaded(online: Answers):
    check_found(online[REPO])


def test_hub_id_with_a_revision_is_fetched_and_loaded(online: Answers):
    check_found(online[f"{REPO}@v1"])


@pytest.mark.usefixtures("online")
def test_record_and_weights_are_fetched_once_and_nothing_else_is(hub: HubServer):
    assert [len(hub.asked(f"/{REPO}/resolve/*/{name}")) for name in FILES] == [1, 1, 0]


def test_missing_repository_is_an_unknown_name(online: Answers):
    check_kinds(online[MISSING], "UnknownNameError", "LookupError")
    assert MISSING in online[MISSING].error


def test_missing_revision_is_an_unknown_name(online: Answers):
    check_kinds(online[NO_REVISION], "UnknownNameError", "LookupError")
    assert "'no-such-revision'" in online[NO_REVISION].error


def test_gated_repository_says_how_to_get_in(online: Answers):
    check_kinds(online[GATED], "UnknownNameError", "LookupError")
    assert "accept its terms" in online[GATED].error


def test_hub_that_is_out_of_order_is_a_file_error(online: Answers):
    check_kinds(online[BROKEN], "BackboneFileError", "OSError")
    assert BROKEN in online[BROKEN].error


def test_hub_that_hangs_up_is_a_file_error(online: Answers):
    check_kinds(online[HANGING], "BackboneFileError", "OSError")
    assert HANGING in online[HANGING].error


@pytest.mark.usefixtures("online")
def test_offline_the_cache_serves_without_a_request_and_what_it_lacks_names_the_switch(hub: HubServer, cache: Path):
    asked = len(hub.requests)
    steps = [("load", source) for source in (REPO, f"{REPO}@v1", "someone/else")]
    first, second, missing = run_elsewhere(*steps, home=cache, address=hub.address, offline=True)
    check_found(first)
    check_found(second)
    assert len(hub.requests) == asked
    check_kinds(missing, "BackboneFileError", "OSError")
    assert "someone/else" in missing.error
    assert "HF_HUB_OFFLINE" in missing.error


@pytest.mark.usefixtures("online")
def test_hub_out_of_reach_is_a_file_error_but_the_cache_serves(cache: Path):
    cached, missing = run_elsewhere(("load", REPO), ("load", "someone/else"), home=cache, address=NOWHERE)
    check_found(cached)
    check_kinds(missing, "BackboneFileError", "OSError")
