"""One large file over HTTP from a server that makes mistakes: the right bytes, fetched once, or a clear error."""

from __future__ import annotations

import hashlib
import resource
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmap_defense.backbones.remote import download as module
from cmap_defense.backbones.remote.download import download
from cmap_defense.errors import BackboneFileError, CmapError
from hubserver import ALWAYS, NOWHERE, Fault, HubServer, Stored, serving


def some_bytes(size: int, seed: int) -> bytes:
    """Bytes that depend on ``seed``, and of which no part is like another."""
    return hashlib.shake_256(str(seed).encode()).digest(size)


BLOCK = 4096
OLD, NEW = some_bytes(100_003, 1), some_bytes(100_003, 2)
SIZE, SHA256 = len(OLD), hashlib.sha256(OLD).hexdigest()
PATH = "/some/checkpoint_80"
WEB_PAGE = Fault(body=b"<!doctype html><title>Log in</title>", headers={"Content-Type": "text/html; charset=utf-8"})


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited; and small blocks, so that a small file has many."""
    waited: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(module, "BLOCK", BLOCK)
    return waited


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


def files_beside(target: Path) -> list[str]:
    """The names of the files in the target's folder."""
    return sorted(path.name for path in target.parent.iterdir())


def partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def ranges(hub: HubServer) -> list[str | None]:
    """The range of each request."""
    return [request.range for request in hub.requests]


def interrupted(hub: HubServer, target: Path, received: int) -> None:
    """A download that was given up after ``received`` bytes."""
    hub.script(PATH, Fault(cut=received), Fault(status=500, times=ALWAYS))
    with pytest.raises(BackboneFileError, match="could not be fetched"):
        download(hub.address + PATH, target)
    hub.script(PATH)
    hub.requests.clear()


@pytest.mark.parametrize("expected", [{}, {"size": SIZE, "sha256": SHA256}])
@pytest.mark.parametrize(("chunked", "older"), [(False, True), (True, False)])
def test_file_arrives_whole_under_its_name_and_its_checksum_is_returned(
    hub: HubServer, target: Path, expected: dict[str, Any], chunked: bool, older: bool
):
    hub.put(PATH, Stored(OLD, chunked=chunked))
    if older:
        target.parent.mkdir()
        target.write_bytes(b"older")
    assert download(hub.address + PATH, target, **expected) == SHA256
    assert target.read_bytes() == OLD
    assert files_beside(target) == ["checkpoint"]
    assert ranges(hub) == [None]


def test_redirection_is_followed_and_the_transfer_behind_it_resumed(hub: HubServer, target: Path):
    hub.script("/moved", Fault(status=302, headers={"Location": PATH}, times=ALWAYS))
    hub.script(PATH, Fault(cut=50_000))
    assert download(hub.address + "/moved", target) == SHA256
    assert [r.range for r in hub.requests_for(PATH)] == [None, "bytes=50000-"]


@pytest.mark.parametrize("cut", [1, BLOCK, 50_000, SIZE - 1])
def test_cut_connection_is_resumed_from_the_next_byte(hub: HubServer, target: Path, waits: list[float], cut: int):
    hub.script(PATH, Fault(cut=cut))
    assert download(hub.address + PATH, target) == SHA256
    assert target.read_bytes() == OLD
    assert ranges(hub) == [None, f"bytes={cut}-"]
    assert hub.requests[1].if_range == hub.files[PATH].etag
    assert [(request.status, request.sent) for request in hub.requests] == [(200, cut), (206, SIZE - cut)]
    assert waits == [], "bytes were gained, so there is no reason to wait"


def test_connection_that_falls_silent_is_given_up_and_resumed(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "TIMEOUT", 1.0)
    hub.script(PATH, Fault(stall=10 * BLOCK))
    assert download(hub.address + PATH, target) == SHA256
    assert target.read_bytes() == OLD
    assert ranges(hub) == [None, f"bytes={10 * BLOCK}-"]


def test_next_call_continues_what_was_given_up(hub: HubServer, target: Path):
    interrupted(hub, target, 30_000)
    assert not target.exists()
    assert partial(target).read_bytes() == OLD[:30_000]
    assert download(hub.address + PATH, target, size=SIZE, sha256=SHA256) == SHA256
    assert target.read_bytes() == OLD
    assert ranges(hub) == ["bytes=30000-"]
    assert files_beside(target) == ["checkpoint"]


def test_whole_partial_file_of_a_process_that_died_is_used_without_a_request(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
):
    def die(_: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "sha256_of", die)
        with pytest.raises(KeyboardInterrupt):
            download(hub.address + PATH, target)
    assert partial(target).read_bytes() == OLD
    hub.requests.clear()
    assert download(hub.address + PATH, target) == SHA256
    assert hub.requests == []
    assert files_beside(target) == ["checkpoint"]


def test_partial_file_of_another_address_is_not_continued(hub: HubServer, target: Path):
    interrupted(hub, target, 30_000)
    hub.put("/other", NEW)
    download(hub.address + "/other", target)
    assert target.read_bytes() == NEW
    assert ranges(hub) == [None]


@pytest.mark.parametrize(
    "notes", [None, "", "{", "[]", "null", '{"url": 3}', '{"url": "URL", "version": null, "total": 9}']
)
def test_partial_file_without_readable_notes_is_not_continued(hub: HubServer, target: Path, notes: str | None):
    url = hub.address + PATH
    target.parent.mkdir()
    partial(target).write_bytes(NEW[:500])
    if notes is not None:
        partial(target).with_name("checkpoint.partial.json").write_text(notes.replace("URL", url))
    assert download(url, target) == SHA256
    assert ranges(hub) == [None]
    assert files_beside(target) == ["checkpoint"]


def test_file_of_unstated_length_is_accepted_only_where_its_size_or_checksum_is_known(hub: HubServer, target: Path):
    hub.put(PATH, Stored(OLD, endless=True))
    with pytest.raises(BackboneFileError, match=r"does not say how long.*backbones convert"):
        download(hub.address + PATH, target)
    assert not target.exists()
    assert download(hub.address + PATH, target, size=SIZE) == SHA256
    assert download(hub.address + PATH, target, sha256=SHA256) == SHA256


def test_secure_address_that_leads_to_one_that_is_not_is_refused(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
):
    def follow(request: urllib.request.Request, **_: object) -> object:
        return urlopen(request.full_url.replace("https:", "http:"))

    urlopen = urllib.request.urlopen
    monkeypatch.setattr(module.urllib.request, "urlopen", follow)
    with pytest.raises(BackboneFileError, match="not secure"):
        download(hub.address.replace("http:", "https:") + PATH, target)
    assert files_beside(target) == []


def test_part_that_begins_elsewhere_is_not_appended(hub: HubServer, target: Path):
    headers = {"Content-Range": f"bytes 40000-{SIZE - 10_001}/{SIZE}", "ETag": hub.files[PATH].etag}
    hub.script(PATH, Fault(cut=50_000), Fault(status=206, body=OLD[40_000 : SIZE - 10_000], headers=headers))
    assert download(hub.address + PATH, target) == SHA256
    assert target.read_bytes() == OLD


@pytest.mark.parametrize(
    ("size", "if_range", "dated"), [(20_000, True, False), (SIZE, False, True), (150_000, False, False)]
)
def test_file_that_changes_on_the_server_is_fetched_anew(
    hub: HubServer, target: Path, size: int, if_range: bool, dated: bool
):
    new = some_bytes(size, 3)
    kept: dict[str, Any] = {"if_range": if_range, "tag": "" if dated else None}
    days = ("Mon, 01 May 2023 00:00:00 GMT", "Tue, 02 May 2023 00:00:00 GMT") if dated else (None, None)
    hub.put(PATH, Stored(OLD, modified=days[0], **kept))
    hub.script(PATH, Fault(cut=50_000, afterwards=lambda: hub.put(PATH, Stored(new, modified=days[1], **kept))))
    assert download(hub.address + PATH, target) == hashlib.sha256(new).hexdigest()
    assert target.read_bytes() == new
    assert ranges(hub)[1] == "bytes=50000-"


def test_date_serves_where_the_tag_is_weak(hub: HubServer, target: Path):
    day = "Mon, 01 May 2023 00:00:00 GMT"
    hub.put(PATH, Stored(OLD, tag='W/"1"', modified=day))
    hub.script(PATH, Fault(cut=50_000))
    assert download(hub.address + PATH, target) == SHA256
    assert [(r.range, r.if_range) for r in hub.requests] == [(None, None), ("bytes=50000-", day)]


@pytest.mark.parametrize("tag", ["", 'W/"1"'])
def test_file_whose_version_is_not_known_is_never_resumed(hub: HubServer, target: Path, tag: str):
    hub.put(PATH, Stored(OLD, tag=tag))
    hub.script(PATH, Fault(cut=50_000, afterwards=lambda: hub.put(PATH, Stored(NEW, tag=tag))))
    download(hub.address + PATH, target)
    assert target.read_bytes() == NEW
    assert ranges(hub) == [None, None]


@pytest.mark.parametrize(
    "faults",
    [[Fault(status=500, times=2), Fault(status=429), Fault(status=502)], [Fault(hang_up=True, times=4)]],
    ids=["5xx", "hangs up"],
)
def test_server_without_a_response_is_tried_again_after_longer_and_longer_waits(
    hub: HubServer, target: Path, waits: list[float], faults: list[Fault]
):
    hub.script(PATH, *faults)
    assert download(hub.address + PATH, target) == SHA256
    assert waits == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(("address", "reason"), [(None, "status 500"), (NOWHERE, ".*refused")])
def test_server_that_stays_out_of_order_or_reach_is_given_up(
    hub: HubServer, target: Path, waits: list[float], address: str | None, reason: str
):
    hub.script(PATH, Fault(status=500, times=ALWAYS))
    url = (address or hub.address) + PATH
    with pytest.raises(
        BackboneFileError, match=rf"could not be fetched: {reason}, after 5 attempts.*network"
    ) as caught:
        download(url, target)
    assert isinstance(caught.value, CmapError)
    assert url in str(caught.value)
    assert len(hub.requests) == (0 if address else module.ATTEMPTS)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert files_beside(target) == []


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "login"), (403, "refused"), (404, "not there any more"), (410, "status 410")]
)
def test_refusal_is_final_and_names_possible_reasons(
    hub: HubServer, target: Path, waits: list[float], status: int, hint: str
):
    hub.script(PATH, Fault(status=status, times=ALWAYS))
    with pytest.raises(BackboneFileError, match=hint) as caught:
        download(hub.address + PATH, target)
    assert f"status {status}" in str(caught.value)
    assert len(hub.requests) == 1
    assert waits == []
    assert files_beside(target) == []


@pytest.mark.parametrize(
    ("fault", "words"), [(WEB_PAGE, "web page"), (Fault(headers={"Content-Encoding": "gzip"}), "compressed")]
)
def test_web_page_and_compressed_response_are_refused_and_what_there_is_is_kept(
    hub: HubServer, target: Path, fault: Fault, words: str
):
    hub.script(PATH, fault, Fault(cut=50_000), fault)
    with pytest.raises(BackboneFileError, match=words):
        download(hub.address + PATH, target)
    assert files_beside(target) == []
    with pytest.raises(BackboneFileError, match=words):
        download(hub.address + PATH, target)
    assert partial(target).read_bytes() == OLD[:50_000]
    assert download(hub.address + PATH, target) == SHA256
    assert ranges(hub)[-1] == "bytes=50000-"


NEW_SHA256 = hashlib.sha256(NEW).hexdigest()
ENDLESS, SHORT = Stored(OLD, endless=True), Stored(OLD[:60_000])


@pytest.mark.parametrize(
    ("stored", "cut", "expected", "words"),
    [
        (Stored(OLD), None, {"size": SIZE - 1}, f"{SIZE:,} bytes, but {SIZE - 1:,} were expected"),
        (Stored(OLD), None, {"size": SIZE + 1}, f"{SIZE:,} bytes, but {SIZE + 1:,} were expected"),
        (Stored(OLD), None, {"size": SIZE, "sha256": NEW_SHA256}, f"{SHA256}.*{NEW_SHA256}"),
        (SHORT, None, {"size": SIZE}, "expected"),
        (SHORT, None, {"sha256": SHA256}, "expected"),
        (ENDLESS, 60_000, {"size": SIZE}, "expected"),
        (ENDLESS, 60_000, {"sha256": SHA256}, "expected"),
    ],
)
def test_other_file_than_the_expected_one_is_refused_and_removed(
    hub: HubServer, target: Path, stored: Stored, cut: int | None, expected: dict[str, Any], words: str
):
    hub.put(PATH, stored)
    hub.script(PATH, Fault(cut=cut))
    with pytest.raises(BackboneFileError, match=words):
        download(hub.address + PATH, target, **expected)
    assert files_beside(target) == []


def test_disk_that_takes_no_more_is_an_error_and_the_next_call_continues(
    hub: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "BLOCK", 2**15)  # written at once, as the real blocks are, and not gathered first
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # a limit that the system enforces on every write
    try:
        with pytest.raises(BackboneFileError, match=r"could not be written.*CMAP_DEFENSE_CACHE"):
            download(hub.address + PATH, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert partial(target).read_bytes() == OLD[: 2**16]
    assert not target.exists()
    assert download(hub.address + PATH, target) == SHA256
    assert target.read_bytes() == OLD
    assert ranges(hub) == [None, "bytes=65536-"]


TROUBLES = st.one_of(
    st.builds(lambda cut, reset: {"cut": cut, "reset": reset}, st.integers(0, 1500), st.booleans()),
    st.sampled_from([{"status": 500}, {"status": 429}, {"hang_up": True}, {"status": 416}]),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.tuples(st.binary(max_size=1500), st.binary(max_size=1500)),
    troubles=st.lists(TROUBLES, max_size=module.ATTEMPTS - 1),
    changes=st.integers(0, 2 * module.ATTEMPTS),
    options=st.fixed_dictionaries(
        {
            "ranges": st.booleans(),
            "if_range": st.booleans(),
            "chunked": st.booleans(),
            "tag": st.sampled_from([None, None, ""]),
        }
    ),
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
    monkeypatch.setattr(module, "BLOCK", block)
    old, new = contents
    shared_hub.put("/law", Stored(old, **options))
    faults = [Fault(**trouble) for trouble in troubles]
    if changes < len(faults):
        faults[changes] = Fault(**troubles[changes], afterwards=lambda: shared_hub.put("/law", Stored(new, **options)))
    shared_hub.script("/law", *faults)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        checksum = download(shared_hub.address + "/law", target)
        assert checksum == hashlib.sha256(target.read_bytes()).hexdigest()
        assert target.read_bytes() in ([old, new] if changes < len(faults) else [old])
        assert files_beside(target) == ["file"]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 300), max_size=12))
def test_no_byte_is_sent_twice_by_a_server_that_can_continue(shared_hub: HubServer, cuts: list[int]):
    shared_hub.put("/once", OLD[:2000])
    shared_hub.script("/once", *[Fault(cut=cut) for cut in cuts])
    before = len(shared_hub.requests)
    with tempfile.TemporaryDirectory() as folder:
        download(shared_hub.address + "/once", Path(folder) / "file")
        assert (Path(folder) / "file").read_bytes() == OLD[:2000]
    assert sum(request.sent for request in shared_hub.requests[before:]) == 2000
