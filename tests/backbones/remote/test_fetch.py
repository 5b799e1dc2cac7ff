"""Official checkpoints by name: fetched once, converted once, by one process at a time, and whole or not at all."""

import errno
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from huggingface_hub import constants

from cmap_defense import PurifiedClassifier, load_backbone
from cmap_defense.backbones import EDMDenoiser, folder
from cmap_defense.backbones.folder import RECORD_FILE
from cmap_defense.backbones.load import resolve_backbone
from cmap_defense.backbones.registry import register, registry_entry
from cmap_defense.backbones.remote.cache import cache_folder, lock_or_wait
from cmap_defense.backbones.remote.fetch import MIRROR, fetch_entry
from cmap_defense.errors import BackboneFileError, UnknownNameError, WrongKindError
from hubserver import HubServer, serving
from tiny import CONFIG, fingerprint, own_names, tiny_backbone, tiny_checkpoint, tiny_entry, tiny_file
from toys import noise

NAME, PATH = "tiny-cd", "/models/tiny/checkpoint_80"
WEIGHTS = "weights.safetensors"
CHECKPOINT, OTHER = tiny_checkpoint(0), tiny_checkpoint(1)
MODEL, OTHER_MODEL = fingerprint(tiny_backbone(0)), fingerprint(tiny_backbone(1))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, a network, no mirror, and names of the test's own."""
    monkeypatch.setenv("CMAP_DEFENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(MIRROR, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with own_names():
        yield tmp_path / "cache"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server with the checkpoint."""
    with serving() as server:
        server.put(PATH, CHECKPOINT)
        yield server


@pytest.fixture
def named(hub: HubServer) -> Callable[..., None]:
    """The checkpoint has its name; the function gives it anew, for options of an OfficialFile or a kind."""

    def give(kind: str = "consistency", **options: Any) -> None:
        register(tiny_entry(NAME, tiny_file(hub.address + PATH, **options), kind=kind), replace=True)

    give()
    return give


def cached_files(cache: Path) -> list[str]:
    """The names of all files in the cache but locks, hidden folders left out."""
    paths = [path.relative_to(cache) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return sorted(path.name for path in paths if not any(part.startswith(".") for part in path.parts))


CONVERSION = [RECORD_FILE, WEIGHTS]


@pytest.mark.usefixtures("named")
def test_name_is_fetched_converted_and_described(hub: HubServer, cache: Path, capsys: pytest.CaptureFixture[str]):
    backbone = load_backbone(NAME)
    assert fingerprint(backbone) == MODEL
    record = backbone.record
    assert record is not None
    assert (record.name, record.licence, record.paper) == (NAME, "CC0", "nowhere")
    assert record.source == {
        "url": hub.address + PATH,
        "fetched_from": hub.address + PATH,
        "size": len(CHECKPOINT),
        "sha256": sha256(CHECKPOINT),
        "converter": "jcm",
        "params": "params_ema",
    }
    assert backbone.default_settings == record.settings == {"n_latents": 2, "iterations": 3}
    assert record.figures == {"fid_one_step": 300.0}
    assert cached_files(cache) == CONVERSION, "the checkpoint is not kept beside its conversion"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert NAME in printed.err
    assert hub.address + PATH in printed.err


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.usefixtures("named")
def test_second_load_needs_no_request_and_prints_nothing(
    hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, offline: bool
):
    resolve_backbone(NAME)
    capsys.readouterr()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert fingerprint(load_backbone(NAME)) == MODEL
    assert len(hub.requests_for()) == 1
    assert capsys.readouterr() == ("", "")


def test_another_reading_of_the_file_under_the_same_name_is_another_model(hub: HubServer, named: Callable[..., None]):
    first = resolve_backbone(NAME)
    named(kind="denoiser")
    assert resolve_backbone(NAME) != first
    named(config=CONFIG.replace(skip_rescale=False))
    assert resolve_backbone(NAME) != first
    named(params="params")
    with pytest.raises(UnknownNameError, match="'params'"):
        resolve_backbone(NAME)
    named()
    assert resolve_backbone(NAME) == first
    assert len(hub.requests_for()) == 4


def test_packaged_model_needs_no_cache(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache.write_text("not a folder")
    entry = registry_entry("fashion-mnist-ct")
    place, source = fetch_entry(entry)
    assert source is entry.sources[0]
    assert (place / RECORD_FILE).is_file()
    assert load_backbone("fashion-mnist-ct").image_shape == (1, 28, 28)


def test_cache_is_beside_the_hubs_unless_a_variable_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CMAP_DEFENSE_CACHE")
    assert cache_folder() == Path(constants.HF_HOME) / "cmap-defense"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CMAP_DEFENSE_CACHE", "~/models")
    assert cache_folder() == tmp_path / "models"


@pytest.mark.usefixtures("named")
def test_cache_that_cannot_be_written_to_is_an_error_that_names_the_variable(hub: HubServer, cache: Path):
    cache.mkdir()
    (cache / "converted").write_text("a file where a folder should be")
    with pytest.raises(BackboneFileError, match="CMAP_DEFENSE_CACHE"):
        load_backbone(NAME)
    assert hub.requests == []


@pytest.mark.parametrize("end", ["", "/"])
def test_mirror_takes_the_place_of_the_address_up_to_the_path(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, end: str
):
    hub.put("/mirror" + PATH, CHECKPOINT)
    monkeypatch.setenv(MIRROR, f"{hub.address}/mirror{end}")
    official = "https://official.example:8443" + PATH
    register(tiny_entry(NAME, tiny_file(official)))
    backbone = load_backbone(NAME)
    assert fingerprint(backbone) == MODEL
    assert [request.path for request in hub.requests_for()] == ["/mirror" + PATH]
    assert backbone.record is not None
    assert backbone.record.source["url"] == official
    assert backbone.record.source["fetched_from"] == f"{hub.address}/mirror{PATH}"
    monkeypatch.delenv(MIRROR)
    assert fingerprint(load_backbone(NAME)) == MODEL, "it is the same model, wherever it was fetched from"
    assert len(hub.requests_for()) == 1


def test_next_source_is_tried_with_the_reason_and_the_last_error_is_raised(
    hub: HubServer, capsys: pytest.CaptureFixture[str]
):
    sources = [tiny_file(hub.address + path) for path in ("/gone", "/gone-too", PATH)]
    register(tiny_entry(NAME, *sources))
    assert fingerprint(load_backbone(NAME)) == MODEL
    printed = capsys.readouterr().err
    for source in sources[:2]:
        assert f"{source.url} cannot be used" in printed
    assert "404" in printed
    register(tiny_entry(NAME, *sources[:2]), replace=True)
    with pytest.raises(BackboneFileError, match=r"/gone-too .*404"):
        load_backbone(NAME)


def test_conversion_of_another_file_than_the_recorded_one_is_made_anew(hub: HubServer, named: Callable[..., None]):
    assert fingerprint(load_backbone(NAME)) == MODEL
    named(sha256=sha256(OTHER))
    with pytest.raises(BackboneFileError, match="not the expected file"):
        load_backbone(NAME)
    hub.put(PATH, OTHER)
    assert fingerprint(load_backbone(NAME)) == OTHER_MODEL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint at all", "not a flax msgpack checkpoint"),
        (b"", "checkpoint"),
        (CHECKPOINT[:90_000], "ends in the middle"),
        (b"PK\x03\x04" + CHECKPOINT, "not a flax msgpack checkpoint"),
        (CHECKPOINT + b"more", "not a flax msgpack checkpoint"),
    ],
    ids=["text", "empty", "short", "zip", "long"],
)
@pytest.mark.usefixtures("named")
def test_file_that_is_no_checkpoint_leaves_nothing(hub: HubServer, cache: Path, content: bytes, message: str):
    hub.put(PATH, content)
    with pytest.raises(BackboneFileError, match=message):
        load_backbone(NAME)
    assert cached_files(cache) == []
    hub.put(PATH, CHECKPOINT)
    assert fingerprint(load_backbone(NAME)) == MODEL


def checkpoint_without(*path: str) -> bytes:
    content = place = msgpack.unpackb(CHECKPOINT)
    for part in path[:-1]:
        place = place[part]
    del place[path[-1]]
    return msgpack.packb(content)


@pytest.mark.parametrize("part", [("params_ema", "Dense_0"), ("params_ema",)])
@pytest.mark.usefixtures("named")
def test_checkpoint_of_another_model_is_removed_and_fetched_afresh(hub: HubServer, cache: Path, part: tuple[str, ...]):
    hub.put(PATH, checkpoint_without(*part))
    with pytest.raises((BackboneFileError, UnknownNameError), match=r"lacks 2 of|no 'params_ema'"):
        load_backbone(NAME)
    assert cached_files(cache) == []
    hub.put(PATH, CHECKPOINT)
    assert fingerprint(load_backbone(NAME)) == MODEL
    assert cached_files(cache) == CONVERSION


def test_checkpoint_of_another_model_whose_checksum_is_recorded_stays_until_force_fetches_the_right_one(
    hub: HubServer, named: Callable[..., None], cache: Path
):
    unfit = checkpoint_without("params_ema", "Dense_0")
    hub.put(PATH, unfit)
    named(sha256=sha256(unfit))
    for _ in range(2):
        with pytest.raises(BackboneFileError, match="lacks 2 of"):
            load_backbone(NAME)
    assert len(hub.requests_for()) == 1
    assert not set(CONVERSION) & set(cached_files(cache))
    hub.put(PATH, CHECKPOINT)
    named()
    resolve_backbone(NAME, force=True)
    assert fingerprint(load_backbone(NAME)) == MODEL
    assert cached_files(cache) == CONVERSION


@pytest.mark.parametrize("damage", [b"", bytes(100), None], ids=["empty", "zeros", "one-bit"])
@pytest.mark.usefixtures("named")
def test_damaged_weights_in_the_cache_are_an_error_and_force_repairs_them(hub: HubServer, damage: bytes | None):
    place = resolve_backbone(NAME)
    whole = (place / WEIGHTS).read_bytes()
    (place / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    with pytest.raises(BackboneFileError, match=rf"{WEIGHTS}.*backbones pull {NAME} --force"):
        load_backbone(NAME)
    assert resolve_backbone(NAME, force=True) == place
    assert fingerprint(load_backbone(NAME)) == MODEL
    assert len(hub.requests_for()) == 2


@pytest.mark.parametrize(
    ("file", "content"), [(WEIGHTS, None), (RECORD_FILE, None), (RECORD_FILE, b""), (RECORD_FILE, b"{}")]
)
@pytest.mark.usefixtures("named")
def test_conversion_that_is_not_whole_is_made_anew(hub: HubServer, file: str, content: bytes | None):
    place = resolve_backbone(NAME)
    (place / file).unlink()
    if content is not None:
        (place / file).write_bytes(content)
    assert fingerprint(load_backbone(NAME)) == MODEL
    assert len(hub.requests_for()) == 2


def test_load_backbone_returns_the_kind_of_the_record(named: Callable[..., None]):
    named(kind="denoiser")
    denoiser = load_backbone(NAME)
    assert type(denoiser) is EDMDenoiser
    assert fingerprint(denoiser) == MODEL
    assert denoiser.record is not None
    assert (denoiser.record.name, denoiser.record.kind, denoiser.record.licence) == (NAME, "denoiser", "CC0")
    expected = EDMDenoiser(tiny_backbone().network, CONFIG.image_shape).denoise(noise(2, 3, 8, 8, seed=5), 2.0)
    torch.testing.assert_close(denoiser.denoise(noise(2, 3, 8, 8, seed=5), 2.0), expected)


@pytest.mark.parametrize(
    ("kind", "needed", "message", "other"),
    [
        ("denoiser", "consistency", "is a denoiser.*Of that kind are: .*cifar10-ct-small", "cifar10-edm"),
        ("consistency", "denoiser", "is a consistency model.*Of that kind are: .*cifar10-edm-small", "cifar10-ct"),
    ],
)
def test_other_kind_than_the_needed_one_is_refused_with_names_of_that_kind(
    named: Callable[..., None], kind: str, needed: str, message: str, other: str
):
    named(kind=kind)
    uses: list[Callable[[], object]] = [lambda: load_backbone(NAME, kind=needed)]
    if needed == "consistency":
        uses.append(lambda: PurifiedClassifier(torch.nn.Identity(), backbone=NAME))
    for use in uses:
        with pytest.raises(WrongKindError, match=message) as error:
            use()
        assert other not in str(error.value)


def write_half(error: BaseException) -> Callable[..., None]:
    """Writing of weights that fails in the middle."""

    def write(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (BackboneFileError("the disk is full"), BackboneFileError),
        (OSError(errno.ENOSPC, "No space left"), BackboneFileError),
    ],
)
@pytest.mark.usefixtures("named")
def test_conversion_that_fails_is_cleared_away_and_the_file_used_by_the_next(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type[BaseException]
):
    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_safetensors", write_half(error))
        with pytest.raises(kind):
            load_backbone(NAME)
    assert not set(CONVERSION) & set(cached_files(cache))
    assert not list(cache.glob("converted/*/*"))
    (left,) = (path.with_suffix("") for path in cache.glob("converted/*.lock"))
    (left / ".partial-killed").mkdir()  # of a process that was killed
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fingerprint(load_backbone(NAME)) == MODEL
    assert len(hub.requests_for()) == 1
    assert not list(cache.glob("converted/*/.partial-*"))


def test_second_process_waits_for_the_first(cache: Path, capsys: pytest.CaptureFixture[str]):
    with ThreadPoolExecutor() as pool, lock_or_wait(cache / "model", NAME):
        waiting = pool.submit(lambda: lock_or_wait(cache / "model", NAME).__enter__())
        while "another process is at work on tiny-cd" not in capsys.readouterr().err:
            assert not waiting.done()
