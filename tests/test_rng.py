"""Noise belongs to (seed, image) and to nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.rng import draw_latents, fresh_seeds, generator_for

SEEDS = st.integers(-(2**63), 2**63 - 1)
SHAPE = (2, 4, 3)


def numbers(*words: int) -> Tensor:
    return torch.randn(8, generator=generator_for(*words))


@settings(deadline=None, max_examples=30)
@given(seeds=st.lists(SEEDS, min_size=2, max_size=5), n_latents=st.integers(1, 4))
def test_latents_of_an_image_depend_on_its_seed_alone(seeds: list[int], n_latents: int):
    together = draw_latents(torch.tensor(seeds), n_latents, SHAPE)
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, draw_latents(torch.tensor([seed]), n_latents, SHAPE)[0])


@settings(deadline=None, max_examples=30)
@given(seeds=st.lists(SEEDS, min_size=2, max_size=3), few=st.integers(1, 3), more=st.integers(0, 3))
def test_first_latents_of_a_seed_are_the_same_for_every_larger_number(seeds: list[int], few: int, more: int):
    fewer, all_of_them = (draw_latents(torch.tensor(seeds), k, SHAPE) for k in (few, few + more))
    assert torch.equal(all_of_them[:, :few], fewer)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, bit=st.integers(0, 63))
def test_every_bit_of_the_seed_counts(seed: int, bit: int):
    flipped = (seed % 2**64) ^ (1 << bit)
    seeds = torch.tensor([seed, (flipped + 2**63) % 2**64 - 2**63])
    first, second = draw_latents(seeds, 1, SHAPE)
    assert not torch.equal(first, second)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_latents_of_one_image_differ(seed: int):
    latents = draw_latents(torch.tensor([seed]), 3, SHAPE)[0]
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])


def test_latents_are_float32_on_the_cpu_and_shaped_batch_latents_image():
    latents = draw_latents(torch.tensor([1, 2, 3]), 4, SHAPE)
    assert (latents.shape, latents.dtype, latents.device.type) == ((3, 4, *SHAPE), torch.float32, "cpu")


def test_no_seeds_give_no_latents():
    assert draw_latents(torch.empty(0, dtype=torch.int64), 4, SHAPE).shape == (0, 4, *SHAPE)


def test_latents_are_unit_normal():
    """Mean 0 and variance 1 within five standard errors of 48000 draws, and about 4.55 % beyond two deviations."""
    latents = draw_latents(torch.arange(20), 10, (3, 10, 8)).double()
    error = latents.numel() ** -0.5
    assert abs(latents.mean().item()) < 5 * error
    assert abs(latents.square().mean().item() - 1) < 5 * 2**0.5 * error
    assert abs((latents.abs() > 2).double().mean().item() - 0.0455) < 5 * 0.21 * error


def test_neighbouring_seeds_are_uncorrelated():
    latents = draw_latents(torch.arange(20), 1, (3, 20, 16)).double().flatten(1)
    correlation = (latents[:-1] * latents[1:]).mean().item()
    assert abs(correlation) < 5 * latents[1:].numel() ** -0.5


def test_default_dtype_does_not_matter():
    expected = draw_latents(torch.tensor([5, 6]), 2, SHAPE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw_latents(torch.tensor([5, 6]), 2, SHAPE), expected)
    finally:
        torch.set_default_dtype(before)


@settings(deadline=None, max_examples=50)
@given(
    first=st.lists(st.integers(-3, 3), min_size=1, max_size=3),
    second=st.lists(st.integers(-3, 3), min_size=1, max_size=3),
)
def test_each_tuple_of_words_is_a_stream_of_its_own(first: list[int], second: list[int]):
    assume(first != second)
    assert not torch.equal(numbers(*first), numbers(*second))


@settings(deadline=None, max_examples=30)
@given(words=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=3))
def test_same_words_give_the_same_stream(words: list[int]):
    assert torch.equal(numbers(*words), numbers(*words))


def test_global_generator_is_not_touched_by_draws():
    state = torch.get_rng_state()
    draw_latents(torch.tensor([1, 2]), 3, SHAPE)
    generator_for(1, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def global_state():
    """torch's global generator, put back afterwards."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.usefixtures("global_state")
def test_fresh_seeds_are_ruled_by_manual_seed():
    torch.manual_seed(3)
    first, second = fresh_seeds(4), fresh_seeds(4)
    torch.manual_seed(3)
    assert torch.equal(fresh_seeds(4), first)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("global_state")
def test_fresh_seeds_are_different_int64_numbers_of_all_64_bits():
    torch.manual_seed(4)
    seeds = fresh_seeds(200)
    assert (seeds.dtype, seeds.shape) == (torch.int64, (200,))
    assert len(set(seeds.tolist())) == 200
    for bit in range(64):
        assert 0 < ((seeds >> bit) & 1).sum().item() < 200, f"bit {bit}"


def test_no_fresh_seeds_for_no_images():
    assert fresh_seeds(0).shape == (0,)
