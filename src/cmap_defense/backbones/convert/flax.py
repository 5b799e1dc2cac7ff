"""Arrays out of a flax checkpoint, without JAX and without reading more of it than is asked for.

The file is one msgpack map. An array is an extension of type 1 that holds msgpack of (shape, dtype name, bytes in C
order); one of more than 2^30 bytes is a map of chunks instead. The file is walked as a stream: a branch that is not
wanted is skipped, so memory holds the wanted arrays and one read buffer.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from cmap_defense.errors import BackboneFileError, UnknownNameError
from cmap_defense.settings import near_matches

__all__ = ["NotACheckpointError", "read_flax"]

ARRAY, NUMPY_SCALAR = 1, 3
CHUNKED = "__msgpack_chunked_array__"
LARGEST_OBJECT = 2**31 - 1
MAX_DEPTH = 32

_MALFORMED = (
    msgpack.UnpackException,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    SyntaxError,
    OverflowError,
    struct.error,
)
"""What reading something else than msgpack of arrays raises."""


class NotACheckpointError(BackboneFileError):
    """The file is cut off or something else altogether: another copy of it may be whole."""


Take = Callable[[str, np.ndarray[Any, Any]], None]


class _TakeError(Exception):
    """What ``take`` raised, which says nothing about the file."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def read_flax(path: str | os.PathLike[str], branch: str, take: Take) -> None:
    """Call ``take(name, array)`` for every array below one entry of a checkpoint's map.

    Args:
        path: the msgpack file.
        branch: the entry, such as "params_ema".
        take: gets names such as "Dense_0/kernel", below the branch, and arrays in the file's precision, which share no
            memory with the file.

    Raises:
        BackboneFileError: the file cannot be read, is cut off, or is not such a checkpoint.
        UnknownNameError: it has no such entry; the message lists those it has.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            stream = msgpack.Unpacker(
                file, raw=False, strict_map_key=False, max_buffer_size=LARGEST_OBJECT, read_size=2**20
            )
            found = []
            for _ in range(stream.read_map_header()):
                found.append(_text(stream.unpack()))
                if found[-1] == branch:
                    _walk(stream, content, "", take, MAX_DEPTH)
                else:
                    stream.skip()  # to the end, so that a file that is cut off behind the branch is noticed too
            if stream.tell() != len(content):
                raise ValueError(f"{len(content) - stream.tell():,} bytes follow the end")
    except _TakeError as error:
        raise error.cause from error.cause.__cause__
    except OSError as error:
        raise BackboneFileError(f"{path} cannot be read: {error}") from error
    except msgpack.OutOfData as error:
        raise NotACheckpointError(
            f"{path} ends in the middle ({path.stat().st_size:,} bytes): the download or copy is not whole. "
            "Fetch it again."
        ) from error
    except _MALFORMED as error:
        raise NotACheckpointError(
            f"{path} is not a flax msgpack checkpoint ({type(error).__name__}: {error}). Fetch it again."
        ) from error
    if branch not in found:
        raise UnknownNameError(f"{path} has no {branch!r}.{near_matches(branch, set(found))}")


def _walk(stream: msgpack.Unpacker, content: mmap.mmap, prefix: str, take: Take, depth: int) -> None:
    """The map that comes next; an entry that is a map itself is walked in its turn."""
    if depth == 0:
        raise ValueError(f"maps are nested more than {MAX_DEPTH} deep")
    entries = stream.read_map_header()
    for _ in range(entries):
        key = _text(stream.unpack())
        name = f"{prefix}/{key}" if prefix else key
        if key == CHUNKED:
            _give(take, prefix, _chunked(stream, entries - 1))
            return
        if _is_map(content, stream.tell()):
            _walk(stream, content, name, take, depth - 1)
        else:
            _give(take, name, _array(stream.unpack()))


def _give(take: Take, name: str, array: np.ndarray[Any, Any]) -> None:
    try:
        take(name, array)
    except Exception as error:
        raise _TakeError(error) from error


def _is_map(content: mmap.mmap, position: int) -> bool:
    """Whether a map begins there; the stream itself cannot be asked without moving it."""
    kind = content[position] if position < len(content) else 0
    return kind & 0xF0 == 0x80 or kind in (0xDE, 0xDF)


def _chunked(stream: msgpack.Unpacker, entries: int) -> np.ndarray[Any, Any]:
    """The rest of a map of chunks: flat pieces, numbered from 0, and the shape of the whole."""
    stream.unpack()  # the marker's own value, True
    parts = {_text(stream.unpack()): stream.unpack() for _ in range(entries)}
    shape, chunks = _listed(parts["shape"]), _listed(parts["chunks"])
    _require_shape(shape)
    if math.prod(shape) > sum(len(chunk.data) for chunk in chunks):  # before anything of that size is allocated
        raise ValueError(f"the chunks do not make an array of shape {shape}")
    flat, filled = np.empty(0), 0
    for i in range(len(chunks)):
        piece, chunks[i] = _array(chunks[i]).ravel(), None  # one at a time, so that no second copy of all is made
        if i == 0:
            flat = np.empty(math.prod(shape), piece.dtype)
        if filled + piece.size > flat.size:
            break
        flat[filled : filled + piece.size] = piece
        filled += piece.size
    if filled != math.prod(shape):
        raise ValueError(f"the chunks do not make an array of shape {shape}")
    return flat.reshape(shape)


def _listed(value: Any) -> list[Any]:
    """A list that may have been written as a map with the keys "0", "1", ..."""
    if isinstance(value, dict):
        return [value[str(i)] for i in range(len(value))]
    return list(value)


def _array(value: Any) -> np.ndarray[Any, Any]:
    """An array, or a scalar as a 0-d array."""
    if isinstance(value, msgpack.ExtType) and value.code in (ARRAY, NUMPY_SCALAR):
        shape, dtype, content = msgpack.unpackb(value.data, raw=True)
        _require_shape(shape)
        if dtype == b"bfloat16":  # the upper half of a float32
            bits = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
            return bits.view(np.float32).reshape(shape)
        kind = np.dtype(dtype.decode())
        if kind.kind not in "biufc" or kind.fields is not None:
            raise ValueError(f"{kind} is no type of numbers")
        return np.frombuffer(content, kind).reshape(shape)
    if isinstance(value, (bool, int, float)):
        return np.asarray(value)
    raise ValueError(f"expected an array, but found {type(value).__name__}")


def _require_shape(shape: Any) -> None:
    if not isinstance(shape, (list, tuple)) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{shape!r:.60} is no shape")


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"expected a name, but found {key!r:.40}")
    return key
