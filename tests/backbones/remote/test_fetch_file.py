"""One large file over HTTP from a server that makes mistakes: the right bytes, continued where they broke off."""

import hashlib
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmap_defense.backbones.remote.hub import fetch_file
from cmap_defense.errors import BackboneFileError, CmapError
from hubserver import ALWAYS, NOWHERE, Fault, HubServer, Stored, serving


def some_bytes(size: int, seed: int) -> bytes:
    """Bytes that depend on ``seed``, and of which no part is like another."""
    return hashlib.shake_256(str(seed).encode()).digest(size)


BLOCK = 4096
OLD, NEW = some_bytes(100_003, 1), some_bytes(100_003, 2)
SIZE = len(OLD)
PATH = "/some/checkpoint_80"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is online and does not wait; and small blocks, so that a small file has many."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", BLOCK)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        server.put(PATH, OLD)
        yield server


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[HubServer]:
    """For property tests, which cannot have a server for each example."""
    with serving() as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "checkpoint"


def partial(target: Path) -> Path | None:
    """What there is of the file."""
    return next(target.parent.glob("*.partial"), None)


def ranges(hub: HubServer) -> list[str | None]:
    """The range of each request for content."""
    return [request.range for request in hub.requests_for()]


def interrupted(hub: HubServer, target: Path, received: int) -> None:
    """A transfer that was given up after ``received`` bytes."""
    hub.script(PATH, Fault(cut=received), Fault(status=500, times=ALWAYS))
    with pytest.raises(BackboneFileError, match="could not be fetched"):
        fetch_file(hub.address + PATH, target)
    hub.script(PATH)
    hub.requests.clear()


@pytest.mark.parametrize(("chunked", "older"), [(False, True), (True, False)])
def test_file_arrives_whole_under_its_name_and_alone(hub: HubServer, target: Path, chunked: bool, older: bool):
    hub.put(PATH, Stored(OLD, chunked=chunked))
    if older:
        target.parent.mkdir()
        target.write_bytes(b"older")
    fetch_file(hub.address + PATH, target)
    assert target.read_bytes() == OLD
    assert [path.name for path in target.parent.iterdir()] == ["checkpoint"]
    assert ranges(hub) == [None]


@pytest.mark.parametrize("cut", [BLOCK, 50_000, SIZE - 1])
def test_cut_connection_is_resumed_from_the_last_block(hub: HubServer, target: Path, cut: int):
    hub.script(PATH, Fault(cut=cut))
    fetch_file(hub.address + PATH, target)
    assert target.read_bytes() == OLD
    requests = hub.requests_for()
    assert requests[1].if_range == hub.files[PATH].etag
    assert [request.status for request in requests] == [200, 206]
    assert sum(request.sent for request in requests) <= SIZE + BLOCK, "a block that was not written is sent again"


def test_next_call_continues_what_was_given_up(hub: HubServer, target: Path):
    interrupted(hub, target, 30_000)
    assert not target.exists()
    kept = partial(target)
    assert kept is not None
    there = kept.read_bytes()
    assert 0 < len(there) <= 30_000
    assert OLD.startswith(there)
    fetch_file(hub.address + PATH, target)
    assert target.read_bytes() == OLD
    assert ranges(hub) == [f"bytes={len(there)}-"]
    assert partial(target) is None


def test_file_of_unknown_size_is_not_continued_by_the_next_call(hub: HubServer, target: Path):
    """All of it may be there, and a server refuses what begins after the end."""
    hub.put(PATH, Stored(OLD, chunked=True))
    interrupted(hub, target, 30_000)
    fetch_file(hub.address + PATH, target)
    assert target.read_bytes() == OLD
    assert ranges(hub) == [None]


@pytest.mark.parametrize("change", ["address", "content", "size"])
def test_partial_file_of_another_file_is_not_continued(hub: HubServer, target: Path, change: str):
    interrupted(hub, target, 30_000)
    path = "/other" if change == "address" else PATH
    new = NEW[:50_000] if change == "size" else NEW
    hub.put(path, new)
    fetch_file(hub.address + path, target)
    assert target.read_bytes() == new
    assert ranges(hub) == [None]
    assert partial(target) is None


def test_file_whose_version_is_not_known_is_not_continued_by_the_next_call(hub: HubServer, target: Path):
    hub.put(PATH, Stored(OLD, tag=""))
    interrupted(hub, target, 30_000)
    hub.put(PATH, Stored(NEW, tag=""))
    fetch_file(hub.address + PATH, target)
    assert target.read_bytes() == NEW
    assert ranges(hub) == [None]


@pytest.mark.parametrize(("address", "reason"), [(None, "404"), (NOWHERE, "refused"), ("nowhere", "protocol|scheme")])
def test_what_cannot_be_fetched_is_an_error_with_address_and_reason(
    hub: HubServer, target: Path, address: str | None, reason: str
):
    hub.script(PATH, Fault(methods=("HEAD", "GET"), status=404, times=ALWAYS))
    url = (address or hub.address) + PATH
    with pytest.raises(BackboneFileError, match=rf"(?s){url} could not be fetched \(.*({reason})") as caught:
        fetch_file(url, target)
    assert isinstance(caught.value, CmapError)
    assert not target.exists()


def test_no_token_goes_to_a_server_that_is_not_the_hub(hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch_file(hub.address + PATH, target)
    assert {request.token for request in hub.requests} == {None}


def test_secure_address_that_leads_to_one_that_is_not_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(location="http://example.org/file", etag="1", size=SIZE)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **_: found)
    with pytest.raises(BackboneFileError, match=r"leads to http://example\.org/file, which is not secure"):
        fetch_file("https://example.org/file", target)
    assert not any(target.parent.iterdir())


def test_disk_that_takes_no_more_is_an_error_and_the_next_call_continues(hub: HubServer, target: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # a limit that the system enforces on every write
    try:
        with pytest.raises(BackboneFileError, match=r"could not be fetched.*CMAP_DEFENSE_CACHE"):
            fetch_file(hub.address + PATH, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = partial(target)
    assert kept is not None
    assert kept.read_bytes() == OLD[: 2**16]
    assert not target.exists()
    fetch_file(hub.address + PATH, target)
    assert target.read_bytes() == OLD
    assert ranges(hub)[-1] == "bytes=65536-"


TROUBLES = st.one_of(
    st.builds(lambda cut, reset: {"cut": cut, "reset": reset}, st.integers(0, 1500), st.booleans()),
    st.sampled_from([{"status": 500}, {"hang_up": True}]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.tuples(st.binary(max_size=1500), st.binary(max_size=1500)),
    troubles=st.lists(TROUBLES, max_size=4),
    changes=st.integers(0, 10),
    options=st.fixed_dictionaries({"ranges": st.booleans(), "tag": st.sampled_from([None, None, ""])}),
    block=st.sampled_from([1, 100, BLOCK]),
)
def test_whatever_happens_the_bytes_are_those_of_one_file(
    shared_hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    contents: tuple[bytes, bytes],
    troubles: list[dict[str, Any]],
    changes: int,
    options: dict[str, Any],
    block: int,
):
    """The file may change on the server after one of the troubles: then the old one or the new one, never a mixture."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", block)
    old, new = contents
    shared_hub.put("/law", Stored(old, **options))
    faults = [Fault(**trouble) for trouble in troubles]
    changed = changes < len(faults)
    if changed:
        faults[changes] = Fault(**troubles[changes], afterwards=lambda: shared_hub.put("/law", Stored(new, **options)))
    shared_hub.script("/law", *faults)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        for _ in range(len(faults) + 2):  # what is not tried again is continued by the next call
            try:
                fetch_file(shared_hub.address + "/law", target)
                break
            except BackboneFileError:
                assert not target.exists()
        assert target.read_bytes() in ([old, new] if changed else [old])
        assert [path.name for path in Path(folder).iterdir()] == ["file"]
