"""From what a user writes to a backbone: a folder, a path, a name, a Hub id.

The Hub is a small server on the loopback device that speaks as much of the Hub's API as a download needs. The real
client talks to it, in a process of its own, since it reads its environment when it is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from cmap_defense.backbones.folder import RECORD_FILE, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.load import load_backbone, resolve_backbone
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import BackboneFileError, CmapError, UnknownNameError
from toys import noise

CONFIG = CompactUNetConfig(
    image_shape=(3, 8, 4), channels=(4, 8), blocks=1, attention=(False, True), head_channels=4, embedding=8
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
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


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "~/no-such-folder-here", Path("nowhere/at-all")])
def test_missing_folder_is_a_file_error_and_not_looked_for_on_the_hub(source: str | Path):
    with pytest.raises(BackboneFileError, match="backbone folder"):
        load_backbone(source)


def test_home_of_an_unknown_person_is_an_error_of_this_package():
    with pytest.raises(CmapError):
        load_backbone("~no-such-person-here/model")


def test_unknown_name_lists_the_near_match():
    with pytest.raises(UnknownNameError, match="'fashion-mnist-ct'"):
        load_backbone("fashion-mnist-c")


@pytest.mark.parametrize("source", ["a/b/c", "a b/c", "someone/", "/".join(["x"] * 4)])
def test_what_is_neither_folder_nor_hub_id_is_an_unknown_name(source: str):
    with pytest.raises(UnknownNameError, match="no backbone"):
        load_backbone(source)


# ---------------------------------------------------------------------------------------------------------- the Hub


@dataclasses.dataclass
class Hub:
    """The server's address and what it was asked for."""

    address: str
    requests: list[tuple[str, str]]

    def fetched(self, file: str) -> int:
        """How often a file's contents were asked for."""
        return sum(method == "GET" and path.endswith(f"/{file}") for method, path in self.requests)


def tell(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    """One whole answer; the body is left out for HEAD."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def hub_handler(files: dict[str, bytes], requests: list[tuple[str, str]]) -> type[BaseHTTPRequestHandler]:
    """Repository information, file tree and files of ``REPO``; the error codes of the real Hub for all else."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.split("?")[0]
            requests.append((self.command, path))
            if path.startswith("/api/models/someone/hangs-up"):
                self.close_connection = True
                return
            if path.startswith("/api/models/someone/out-of-order"):
                self.refuse(500, "", "Internal error")
                return
            if path.startswith("/api/models/someone/gated"):
                self.refuse(403, "GatedRepo", "Access to this model is restricted")
                return
            api, resolve = f"/api/models/{REPO}", f"/{REPO}/resolve/"
            revision = path.removeprefix(api).removeprefix(resolve).strip("/").split("/")
            if path in (api, f"{api}/revision/main", f"{api}/revision/v1"):
                siblings = [{"rfilename": name} for name in files]
                self.answer_json({"_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
            elif path.startswith(f"{api}/tree/"):
                self.answer_json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                )
            elif path.startswith(f"{api}/revision/"):
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision[-1]}")
            elif path.startswith(resolve) and revision[-1] in files:
                data = files[revision[-1]]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
                tell(self, 200, data, headers | {"Content-Type": "application/octet-stream"})
            else:
                self.refuse(404, "RepoNotFound", "Repository not found")

        def answer_json(self, value: object) -> None:
            tell(self, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str, message: str) -> None:
            body = json.dumps({"error": message}).encode()
            headers = {"Content-Type": "application/json", "X-Error-Message": message}
            tell(self, status, body, headers | ({"X-Error-Code": code} if code else {}))

    return Handler


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with one repository: a backbone folder, and a file that nobody should fetch."""
    folder = write_toy(tmp_path_factory.mktemp("hub") / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"huge.bin": b"0" * 100}
    requests: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_handler(files, requests))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_address[1]}", requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


PROGRAM = """
import json, sys
from cmap_defense.backbones.load import load_backbone
results = []
for source in sys.argv[1:]:
    try:
        backbone = load_backbone(source)
        results.append({"name": backbone.record.name, "shape": list(backbone.image_shape)})
    except Exception as error:
        results.append({"error": str(error), "kinds": [kind.__name__ for kind in type(error).__mro__]})
print("\\n" + json.dumps(results))
"""


def load_elsewhere(*sources: str, address: str, cache: Path, offline: bool = False) -> list[dict]:
    """What load_backbone gives or raises for each source, in a process of its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
    }
    environment = kept | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *sources],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FOUND = {"name": "toy", "shape": list(CONFIG.image_shape)}
MISSING, GATED, BROKEN, HANGING = (f"someone/{name}" for name in ("no-such-model", "gated", "out-of-order", "hangs-up"))
NO_REVISION = f"{REPO}@no-such-revision"
Answers = dict[str, dict]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's cache, which the processes of this file share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub: Hub, cache: Path) -> Answers:
    """What came of each source while the Hub was there; the repository twice, then what the Hub refuses."""
    sources = (REPO, f"{REPO}@v1", MISSING, NO_REVISION, GATED, BROKEN, HANGING)
    return dict(zip(sources, load_elsewhere(*sources, address=hub.address, cache=cache), strict=True))


def check_kinds(answer: dict, *kinds: str) -> None:
    """The answer is an error of this package and of these kinds."""
    assert {"CmapError", *kinds} <= set(answer.get("kinds", ())), answer


def test_hub_id_is_fetched_and_loaded(online: Answers):
    assert online[REPO] == FOUND


def test_hub_id_with_a_revision_is_fetched_and_loaded(online: Answers):
    assert online[f"{REPO}@v1"] == FOUND


@pytest.mark.usefixtures("online")
def test_record_and_weights_are_fetched_once_and_nothing_else_is(hub: Hub):
    assert (hub.fetched(RECORD_FILE), hub.fetched("weights.safetensors"), hub.fetched("huge.bin")) == (1, 1, 0)


def test_missing_repository_is_an_unknown_name(online: Answers):
    check_kinds(online[MISSING], "UnknownNameError", "LookupError")
    assert MISSING in online[MISSING]["error"]


def test_missing_revision_is_an_unknown_name(online: Answers):
    check_kinds(online[NO_REVISION], "UnknownNameError", "LookupError")
    assert "'no-such-revision'" in online[NO_REVISION]["error"]


def test_gated_repository_says_how_to_get_in(online: Answers):
    check_kinds(online[GATED], "UnknownNameError", "LookupError")
    assert "accept its terms" in online[GATED]["error"]


def test_hub_that_is_out_of_order_is_a_file_error(online: Answers):
    check_kinds(online[BROKEN], "BackboneFileError", "OSError")
    assert BROKEN in online[BROKEN]["error"]


def test_hub_that_hangs_up_is_a_file_error(online: Answers):
    check_kinds(online[HANGING], "BackboneFileError", "OSError")
    assert HANGING in online[HANGING]["error"]


@pytest.mark.usefixtures("online")
def test_offline_the_cache_serves_without_a_request_and_what_it_lacks_names_the_switch(hub: Hub, cache: Path):
    asked = len(hub.requests)
    sources = (REPO, f"{REPO}@v1", "someone/else")
    first, second, missing = load_elsewhere(*sources, address=hub.address, cache=cache, offline=True)
    assert (first, second) == (FOUND, FOUND)
    assert len(hub.requests) == asked
    check_kinds(missing, "BackboneFileError", "OSError")
    assert "someone/else" in missing["error"]
    assert "HF_HUB_OFFLINE" in missing["error"]


@pytest.mark.usefixtures("online")
def test_hub_out_of_reach_is_a_file_error_but_the_cache_serves(cache: Path):
    cached, missing = load_elsewhere(REPO, "someone/else", address="http://127.0.0.1:9", cache=cache)
    assert cached == FOUND
    check_kinds(missing, "BackboneFileError", "OSError")
