"""Recorded results of the official implementations (tests/golden/README.md), and files in their format."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from cmap_defense.backbones.ncsnpp import NCSNppConfig

FOLDER = Path(__file__).parent / "golden"
BESIDE = Path(__file__).parents[2] / "shared" / "golden"
"""Further recordings, too large to be part of the project; they are used where they are found."""


def arrays(*paths: Path) -> dict[str, Tensor]:
    """All arrays of some .npz files, as they are."""
    found = {}
    for path in paths:
        with np.load(path) as file:
            found |= {name: torch.from_numpy(file[name]) for name in file.files}
    return found


def channels_first(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images [B, H, W, C] turned to [B, C, H, W]; everything else as it is."""
    return {name: a.permute(0, 3, 1, 2).contiguous() if a.ndim == 4 else a for name, a in recorded.items()}


@dataclasses.dataclass(frozen=True)
class JCM:
    """A checkpoint of the JAX code and what that code computes with it; images are [B, C, H, W]."""

    name: str
    checkpoint: Path
    config: NCSNppConfig
    arrays: dict[str, Tensor]


def jcm(name: str) -> JCM:
    """One of :func:`jcm_names`."""
    if name == "tiny_c":
        folder = FOLDER / name
        return JCM(name, folder / "checkpoint_80", NCSNppConfig(nf=8), channels_first(arrays(folder / "io.npz")))
    folder = BESIDE / name
    spec = json.loads((folder / "meta.json").read_text())["spec"]
    config = NCSNppConfig(**{key: spec[key] for key in ("nf", "ch_mult", "num_res_blocks", "attn_resolutions")})
    recorded = arrays(folder / "inputs.npz", folder / "outputs.npz")
    recorded |= {f"{key}_f64": value for key, value in arrays(folder / "outputs_f64.npz").items()}
    samples = len(recorded["sigma"])
    thinned = {key: value[::2] if value.ndim and len(value) == samples else value for key, value in recorded.items()}
    return JCM(name, folder / "checkpoint_80", config, channels_first(thinned))


def jcm_names() -> list[str]:
    """The checkpoints that are here."""
    return ["tiny_c", *(name for name in ("tiny_a",) if (BESIDE / name).is_dir())]


def flax_array(array: Any) -> msgpack.ExtType:
    """An array as flax writes it: extension 1 around (shape, dtype name, bytes in C order)."""
    array = np.asarray(array)
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Maps in maps from names such as "Dense_0/kernel"."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *branches, leaf = name.split("/")
        place = tree
        for branch in branches:
            place = place.setdefault(branch, {})
        place[leaf] = value
    return tree


def flax_bytes(tree: Any) -> bytes:
    """A file of flax's, or a part of one; arrays of numpy may stand anywhere in it."""
    return msgpack.packb(tree, default=flax_array)


def full_size_weights() -> Iterator[tuple[str, np.ndarray]]:
    """The weights behind golden/full_det, tensor by tensor; raises when numpy draws other numbers than it did there."""
    shapes = json.loads((FOLDER / "full_det" / "full_tree.json").read_text())["tree"]
    check = json.loads((FOLDER / "full_det" / "check.json").read_text())
    random, digest = np.random.RandomState(check["seed"]), hashlib.sha256()
    for name in sorted(shapes):
        shape, leaf = tuple(shapes[name]), name.split("/")[-1]
        drawn = random.standard_normal(shape)
        if name.startswith("GaussianFourier"):
            values = 16 * drawn
        elif leaf in ("kernel", "weight", "W"):
            values = drawn / math.sqrt(math.prod(shape[:-1]))
        else:
            values = 1 + 0.2 * drawn if leaf == "scale" else 0.1 * drawn
        stored = values.astype("<f4")
        digest.update(name.encode())
        digest.update(stored)
        yield name, stored
    assert digest.hexdigest() == check["sha256_of_sorted_name_bytes_then_values"]
