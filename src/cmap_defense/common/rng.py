"""Noise that belongs to (seed, image), never to a batch, a chunk or a device.

All generators are CPU generators and all draws are float32, cast afterwards: the same seed gives the same numbers
everywhere. Nothing here touches torch's global generators but ``fresh_seeds``, which is meant to, and
``isolated``, which restores them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64


def generator_for(*words: int) -> torch.Generator:
    """A CPU generator seeded by one or several integers, such as (seed, step).

    Of the mixed words torch's CPU generator uses 32 bits: enough for the steps of a training or the start of an
    attack, not
    for one stream per image (see ``draw_latents``).
    """
    state = words[0] % _WORD
    for word in words[1:]:
        state = _mix((_mix(state) + word) % _WORD)
    return torch.Generator("cpu").manual_seed(state)


def fresh_seeds(count: int) -> Tensor:
    """[count] int64 seeds from torch's global CPU generator, so that ``torch.manual_seed`` rules them."""
    low, high = -(2**63), 2**63 - 1
    return torch.randint(low, high, (count,), dtype=torch.int64, device="cpu")


def derived_seeds(seeds: Tensor, stream: int) -> Tensor:
    """[B] int64 seeds for another purpose than that of ``seeds``: functions of each seed and the stream's number."""
    mixed = [_mix((_mix(seed % _WORD) + stream) % _WORD) for seed in seeds.tolist()]
    return torch.tensor([(word + _WORD // 2) % _WORD - _WORD // 2 for word in mixed], dtype=torch.int64, device="cpu")


def draw_latents(seeds: Tensor, n_latents: int, image_shape: Sequence[int], *, step: int = 0) -> Tensor:
    """Unit noise [B, K, C, H, W] in float32 on the CPU; row b is a function of ``seeds[b]`` and ``step`` alone.

    Each seed is the key of a Philox generator of numpy's, which uses all 64 bits (torch's CPU generator uses 32). The
    latents of one image are drawn one after the other, so the first K of a seed are the same for every larger K.

    Args:
        seeds: [B] int64, one per image.
        n_latents: K, the latents or purified versions of an image.
        image_shape: (C, H, W).
        step: number of the draw, where a purification needs noise more than once. Each has a part of the generator's
            sequence to itself, so that the noise of a step can be drawn again without that of the steps before.
    """
    drawn = np.empty((len(seeds), n_latents, *image_shape), dtype=np.float32)
    for row, generator in zip(drawn, _generators(seeds, step), strict=True):
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(drawn)


def draw_uniform(seeds: Tensor, shape: Sequence[int], *, step: int = 0) -> Tensor:
    """Numbers in [0, 1), [B, *shape] in float32 on the CPU; row b is a function of ``seeds[b]`` and ``step`` alone."""
    drawn = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, generator in zip(drawn, _generators(seeds, step), strict=True):
        generator.random(dtype=np.float32, out=row)
    return torch.from_numpy(drawn)


def _generators(seeds: Tensor, step: int) -> Iterator[np.random.Generator]:
    """A generator for each seed, 2^192 draws behind the one of the step before."""
    for seed in seeds.tolist():
        yield np.random.Generator(np.random.Philox(key=seed % _WORD, counter=step << 192))


@contextlib.contextmanager
def isolated(*words: int) -> Iterator[None]:
    """Torch's global generators start from these integers in here, and are put back as they were afterwards.

    For code of others that draws from them. Seen from outside it leaves no trace.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(generator_for(*words).initial_seed())
        if devices:
            torch.cuda.manual_seed_all(torch.default_generator.initial_seed())
        yield


def _mix(word: int) -> int:
    """A bijective scrambling of 64 bits, so that neighbouring seeds and steps share no structure."""
    word = (word + 0x9E3779B97F4A7C15) % _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % _WORD
    return word ^ (word >> 31)
