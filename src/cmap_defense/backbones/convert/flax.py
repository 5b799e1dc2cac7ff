"""Arrays out of a flax checkpoint, without JAX.

The file is one msgpack map. An array is an extension of type 1 that holds msgpack of (shape, dtype name, bytes in C
order), a scalar of numpy one of type 3; an array of more than 2^30 bytes is a map of flat chunks instead. Entries of
the map that are not wanted are skipped, so that memory holds the wanted arrays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from cmap_defense.backbones.weights import apparent_kind
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import BackboneFileError, UnknownNameError

ARRAY_CODES = (1, 3)
CHUNKED = "__msgpack_chunked_array__"
LARGEST_FILE_BUFFER = 2**31 - 1
LARGEST_MAP = 2**20
"""Entries of one map or list. A damaged file may declare billions, for which memory would be set aside."""


class NotACheckpointError(BackboneFileError):
    """The file is cut off or something else altogether: another copy of it may be whole."""


def read_flax(path: str | os.PathLike[str], entry: str) -> dict[str, np.ndarray]:
    """All arrays below one entry of a checkpoint's map."""
    path = Path(path)
    names: list[str] = []
    arrays: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file:
            stream = msgpack.Unpacker(
                file,
                ext_hook=_array,
                object_hook=_joined_chunks,
                strict_map_key=False,
                max_buffer_size=LARGEST_FILE_BUFFER,
                max_map_len=LARGEST_MAP,
                max_array_len=LARGEST_MAP,
                read_size=2**20,
            )
            for _ in range(stream.read_map_header()):
                names.append(_name(stream.unpack()))
                if names[-1] == entry:
                    tree = stream.unpack()
                    if not isinstance(tree, dict):
                        raise ValueError(f"{entry!r} is no map of arrays")
                    arrays = dict(_leaves(tree, ""))
                else:
                    stream.skip()  # to the end, so that a file that is cut off further on is noticed too
            following = path.stat().st_size - stream.tell()
            if following:
                raise ValueError(f"{following:,} bytes follow the end")
    except OSError as error:
        raise BackboneFileError(f"{path} cannot be read: {error}") from error
    except msgpack.OutOfData as error:
        raise NotACheckpointError(
            f"{path} ends in the middle ({path.stat().st_size:,} bytes): the download or copy is not whole. "
            "Fetch it again."
        ) from error
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # reading something else than msgpack of arrays may raise anything
        raise NotACheckpointError(
            f"{path} is not a flax msgpack checkpoint ({type(error).__name__}: {error}){apparent_kind(path)}. Fetch it "
            "again."
        ) from error
    if entry not in names:
        raise UnknownNameError(f"{path} has no {entry!r}.{near_matches(entry, set(names))}")
    return arrays


def _leaves(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        name = f"{prefix}{_name(key)}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}/")
        elif isinstance(value, (bool, int, float, np.ndarray)):
            yield name, np.asarray(value)
        else:
            raise ValueError(f"{name!r} should be an array, but is {type(value).__name__}")


def _array(code: int, content: bytes) -> np.ndarray:
    if code not in ARRAY_CODES:
        raise ValueError(f"extension {code} is no array")
    shape, dtype, numbers = msgpack.unpackb(content, raw=True)
    _require_shape(shape)
    if dtype == b"bfloat16":  # the upper half of a float32
        return (np.frombuffer(numbers, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    kind = np.dtype(dtype.decode())
    if kind.kind not in "biufc" or kind.fields is not None:
        raise ValueError(f"{kind} is no type of numbers")
    return np.frombuffer(numbers, kind).reshape(shape)


def _joined_chunks(values: dict[Any, Any]) -> Any:
    """A map, or the array whose flat chunks it holds; flax writes lists as lists, or as maps from "0", "1", ..."""
    if CHUNKED not in values:
        return values
    shape, chunks = (
        [value[str(i)] for i in range(len(value))] if isinstance(value, dict) else list(value)
        for value in (values["shape"], values["chunks"])
    )
    _require_shape(shape)
    flat = np.concatenate([chunk.ravel() for chunk in chunks])
    if flat.size != math.prod(shape):
        raise ValueError(f"the chunks do not make an array of shape {shape}")
    return flat.reshape(shape)


def _require_shape(shape: Any) -> None:
    if not isinstance(shape, (list, tuple)) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{shape!r:.60} is no shape")


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"expected a name, but found {key!r:.40}")
    return key
