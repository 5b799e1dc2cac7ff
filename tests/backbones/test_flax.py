"""Arrays out of flax checkpoints: every encoding, every kind of damage, and nothing read that is not wanted."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmap_defense.backbones.convert import flax
from cmap_defense.backbones.convert.flax import read_flax
from cmap_defense.errors import BackboneFileError, UnknownNameError
from goldens import FOLDER, flax_bytes, nested
from toys import noise

CHUNKED = "__msgpack_chunked_array__"
ENTRY = b"\x81\xaaparams_ema"
"""The start of a file: a map of one entry of this name."""


def numbers(*shape: int, seed: int = 1) -> np.ndarray:
    return noise(*shape, seed=seed).numpy()


def read(path: Path, data: Any, entry: str = "params_ema") -> list[tuple[str, np.ndarray]]:
    """Names and arrays of a file of these bytes, or of this value, in order."""
    path.write_bytes(data if isinstance(data, bytes) else flax_bytes(data))
    return list(read_flax(path, entry).items())


def raw_array(*parts: Any, code: int = 1) -> msgpack.ExtType:
    """An extension that holds these parts, be they an array or not."""
    return msgpack.ExtType(code, msgpack.packb(parts, use_bin_type=True))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "bool", "uint8", "uint32", "int8", "int16", "int32", "int64"]
)
def test_arrays_of_every_precision_are_read_to_the_bit(file: Path, dtype: str):
    array = (40 * numbers(2, 3, 4)).astype(dtype if dtype[0] != "u" else "int32").astype(dtype)
    ((name, found),) = read(file, {"params_ema": {"a": array}})
    assert name == "a"
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_bfloat16_is_read_as_float32(file: Path):
    narrow = torch.cat([noise(5, 4, seed=2), torch.tensor([[0.0, -0.0, 3e38, float("inf")]])]).bfloat16()
    content = narrow.view(torch.int16).numpy().tobytes()
    ((_, found),) = read(file, {"params_ema": {"a": raw_array(narrow.shape, "bfloat16", content)}})
    assert found.dtype == np.float32
    assert torch.equal(torch.tensor(found), narrow.float())


def test_names_are_paths_below_the_entry_in_the_files_order(file: Path):
    names = ["Dense_0/kernel", "Dense_0/bias", "a", "Block_1/Conv_0/kernel", "Block_1/Conv_10/kernel", "z/y/x/w"]
    leaves = {name: numbers(2, index + 1) for index, name in enumerate(names)}
    taken = read(file, {"step": 7, "params_ema": nested(leaves), "opt_state": {"0": {"mu": nested(leaves)}}})
    assert [name for name, _ in taken] == names
    assert all(np.array_equal(array, leaves[name]) for name, array in taken)


def test_chunks_as_flax_writes_them(file: Path):
    (name, found), (after, _) = read(file, (FOLDER / "ops" / "chunked.msgpack").read_bytes())
    expected = np.load(FOLDER / "ops" / "chunked_expected.npy")
    assert (name, after) == ("Dense_0/kernel", "Dense_0/bias")
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def chunked(array: np.ndarray, pieces: int, listed: Callable[[list], Any] = list) -> dict[str, Any]:
    parts = np.array_split(array.ravel(), pieces)
    return {CHUNKED: True, "shape": listed(list(array.shape)), "chunks": listed(parts)}


def as_map(values: list) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}


@pytest.mark.parametrize("listed", [list, as_map])
@pytest.mark.parametrize("pieces", [1, 2, 11])
def test_chunks_stand_anywhere_among_arrays(file: Path, pieces: int, listed: Callable[[list], Any]):
    first, second, third = numbers(3, 2, 4), numbers(5, 7), numbers(2)
    block = {"kernel": chunked(first, pieces, listed), "bias": third}
    tree = {"a": third, "deep": {"er": block, "last": chunked(second, pieces, listed)}, "z": 4}
    taken = dict(read(file, {"params_ema": tree, "step": 1}))
    expected = {"a": third, "deep/er/kernel": first, "deep/er/bias": third, "deep/last": second, "z": np.asarray(4)}
    assert list(taken) == list(expected)
    assert all(np.array_equal(array, expected[name]) for name, array in taken.items())


BROKEN_CHUNKS = {
    "too few numbers": {"shape": [4, 4]},
    "too many numbers": {"shape": [2, 2]},
    "many more numbers than there are": {"shape": [2**40, 2**40]},
    "negative size": {"shape": [-4, -3]},
    "size to be found out": {"shape": [-1, 3]},
    "size of text": {"shape": ["4", "3"]},
    "no shape": {"shape": None},
    "no chunks": {"chunks": None},
    "empty list of chunks": {"chunks": []},
    "chunk without bytes": {"chunks": [3, "text"]},
    "chunks with a gap": {"chunks": {"0": numbers(6), "2": numbers(6)}},
}


@pytest.mark.parametrize("changes", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS.keys())
def test_chunks_that_do_not_make_the_array_are_refused(file: Path, changes: dict[str, Any]):
    values = chunked(numbers(4, 3), 2) | changes
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(BackboneFileError, match="is not a flax msgpack checkpoint"):
        read(file, {"params_ema": {"a": values}})


def test_unknown_entry_names_the_near_match(file: Path):
    with pytest.raises(UnknownNameError, match=r"no 'param_ema'.*Did you mean 'params_ema' or 'params'\?") as caught:
        read(file, {"step": 1, "params": {}, "params_ema": {}, "opt_state": {}}, "param_ema")
    assert isinstance(caught.value, LookupError)
    assert str(file) in str(caught.value)


LEAVES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.arange(3, dtype=np.int32), "b/d": np.ones(())}


def test_file_that_is_cut_anywhere_is_refused(file: Path):
    """A copy that ends early is never taken for the whole, not even where the wanted entry is whole."""
    tree = {"step": 5, "params": nested(LEAVES), "params_ema": nested(LEAVES | {"b/e": np.zeros((2, 2))})}
    tree["params_ema"]["f"] = chunked(numbers(4, 2), 2)
    data = flax_bytes(tree | {"opt_state": nested(LEAVES)})
    assert len(read(file, data)) == 5
    for end in range(len(data)):
        with pytest.raises(BackboneFileError, match="ends in the middle") as caught:
            read(file, data[:end])
        assert str(file) in str(caught.value)


def test_file_that_goes_on_behind_its_end_is_refused(file: Path):
    with pytest.raises(BackboneFileError, match="5 bytes follow the end"):
        read(file, flax_bytes({"params_ema": nested(LEAVES)}) + bytes(5))


def test_file_with_any_byte_changed_is_refused_or_read(file: Path):
    """Nothing but our own errors comes out of damage."""
    data = flax_bytes({"params": {"a": 1}, "params_ema": nested(LEAVES) | {"f": chunked(numbers(4, 2), 2)}})
    for place in range(len(data)):
        for change in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[place] ^= change
            try:
                taken = read(file, bytes(damaged))
            except (BackboneFileError, UnknownNameError):
                continue
            assert all(isinstance(array, np.ndarray) for _, array in taken)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from([b"", ENTRY, ENTRY + b"\x82\xa1a\x01\xa1b"]), data=st.binary(max_size=200))
def test_random_bytes_are_refused_or_are_a_checkpoint(tmp_path: Path, start: bytes, data: bytes):
    try:
        taken = read(tmp_path / "checkpoint", start + data)
    except (BackboneFileError, UnknownNameError):
        return
    assert all(isinstance(array, np.ndarray) for _, array in taken)


NOT_CHECKPOINTS = {
    "a web page": b"<!doctype html><html><body>Not found</body></html>" * 20,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "a list": [1, 2],
    "a number": 7,
    "never used": b"\xc1" * 9,
    "names that are numbers": {1: {"a": 1}},
    "names that are not text": b"\x81\xa2\xff\xff\x01",
    "entry is a number": {"params_ema": 3},
    "entry is an array": {"params_ema": numbers(2)},
    "leaf is text": {"params_ema": {"a": "kernel"}},
    "leaf is nothing": {"params_ema": {"a": None}},
    "leaf is a list": {"params_ema": {"a": [1.0, 2.0]}},
    "leaf is bytes": {"params_ema": {"a": b"abcd"}},
    "leaf of another extension": {"params_ema": {"a": msgpack.ExtType(2, b"\0" * 16)}},
    "number below the entry as a name": {"params_ema": {1: 1}},
    "list as a name": ENTRY + b"\x81\x90\x01",
    "nothing in an array": {"params_ema": {"a": msgpack.ExtType(1, b"")}},
    "garbage in an array": {"params_ema": {"a": msgpack.ExtType(1, b"garbage")}},
    "two parts of an array": {"params_ema": {"a": raw_array((2,), "float32")}},
    "too few bytes": {"params_ema": {"a": raw_array((2, 3), "float32", b"\0" * 20)}},
    "too many bytes": {"params_ema": {"a": raw_array((2, 3), "float32", b"\0" * 28)}},
    "half a number": {"params_ema": {"a": raw_array((2, 3), "float32", b"\0" * 23)}},
    "half a number in bfloat16": {"params_ema": {"a": raw_array((2,), "bfloat16", b"\0" * 3)}},
    "shape of text": {"params_ema": {"a": raw_array("ab", "float32", b"\0" * 8)}},
    "shape of fractions": {"params_ema": {"a": raw_array((1.5, 2), "float32", b"\0" * 12)}},
    "shape with a size below zero": {"params_ema": {"a": raw_array((2, -1), "float32", b"\0" * 24)}},
    "shape of seventy axes": {"params_ema": {"a": raw_array((1,) * 70, "float32", b"\0" * 4)}},
    "objects": {"params_ema": {"a": raw_array((2, 3), "object", b"\0" * 48)}},
    "objects by their letter": {"params_ema": {"a": raw_array((2, 3), "O", b"\0" * 48)}},
    "unknown precision": {"params_ema": {"a": raw_array((2, 3), "float31", b"\0" * 24)}},
    "precision that is a number": {"params_ema": {"a": raw_array((2, 3), 5, b"\0" * 24)}},
    "precision that is no expression": {"params_ema": {"a": raw_array((2, 3), "14)", b"\0" * 24)}},
    "precision in foreign letters": {"params_ema": {"a": raw_array((2,), b"\xff\xfe", b"\0" * 8)}},
}


@pytest.mark.parametrize("data", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS.keys())
def test_what_is_no_checkpoint_is_refused(file: Path, data: Any):
    with pytest.raises(BackboneFileError, match="is not a flax msgpack checkpoint") as caught:
        read(file, data)
    assert isinstance(caught.value, OSError)
    assert str(file) in str(caught.value)


def test_web_page_in_place_of_the_file_is_called_one(file: Path):
    file.write_bytes(b"<!DOCTYPE html><title>Log in to this network</title>")
    with pytest.raises(BackboneFileError, match="it is a web page, such as a login or an error page"):
        read_flax(file, "params_ema")


def test_maps_may_be_nested_but_not_without_end(file: Path):
    tree: Any = 1
    for _ in range(20):
        tree = {"a": tree}
    ((name, _),) = read(file, {"params_ema": tree})
    assert name == "/".join("a" * 20)
    for opened in (b"\x81\xa1a", b"\x91", b"\x91\x81\xa1a"):
        for start in (ENTRY + b"\x81\xa1a", b"\x82\xa4step"):
            with pytest.raises(BackboneFileError):
                read(file, start + 100_000 * opened)
    with pytest.raises(BackboneFileError, match="RecursionError"):
        read(file, ENTRY + 1000 * b"\x81\xa1a" + b"\x01")


HUGE = {
    "map": b"\xdf\xff\xff\xff\xff",
    "map of the entry": ENTRY + b"\xdf\xff\xff\xff\xff",
    "text for a name": b"\x81\xdb\x7f\xff\xff\xff",
    "text": ENTRY + b"\x81\xa1a\xdb\x7f\xff\xff\xff",
    "bytes": ENTRY + b"\x81\xa1a\xc6\x7f\xff\xff\xff",
    "list": ENTRY + b"\x81\xa1a\xdd\x7f\xff\xff\xff",
    "array": ENTRY + b"\x81\xa1a\xc9\x7f\xff\xff\xff\x01",
    "array beyond the format": ENTRY + b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "list that is skipped": b"\x82\xa4step\xdd\x7f\xff\xff\xff",
    "array that is skipped": b"\x82\xa4step\xc9\x7f\xff\xff\xff\x01",
    "shape": msgpack.packb({"params_ema": {"a": raw_array((2**62,), "float32", b"\0" * 8)}}),
    "shape of many": msgpack.packb({"params_ema": {"a": raw_array((2**31, 2**31, 2**31), "int8", b"\0" * 8)}}),
    "shape of chunks": flax_bytes({"params_ema": {"a": chunked(numbers(4, 3), 2) | {"shape": [2**15, 2**15]}}}),
    "bytes in an array": msgpack.packb({"params_ema": {"a": msgpack.ExtType(1, b"\x93\x91\x02\xc6\x7f\xff\xff\xff")}}),
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE.keys())
def test_huge_sizes_that_are_only_declared_take_no_memory(file: Path, data: bytes):
    tracemalloc.start()
    try:
        with pytest.raises(BackboneFileError):
            read(file, data + b"\x01" * 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**26


def test_missing_file_and_a_folder_in_its_place_are_errors_that_name_it(tmp_path: Path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(BackboneFileError, match="cannot be read") as caught:
            read_flax(path, "params_ema")
        assert str(path) in str(caught.value)


def test_memory_that_is_short_says_nothing_of_the_file(file: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that is called no checkpoint is removed by who fetched it."""

    def full(code: int, data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(flax, "_array", full)
    with pytest.raises(MemoryError):
        read(file, {"params_ema": {"a": numbers(4, 3)}})
