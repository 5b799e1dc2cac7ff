"""Noise belongs to (seed, image) and to nothing else."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.common.rng import derived_seeds, draw_latents, draw_uniform, fresh_seeds, generator_for, isolated

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
@given(seeds=st.lists(SEEDS, min_size=2, max_size=3), step=st.integers(1, 2000), few=st.integers(1, 3))
def test_noise_of_a_step_is_a_function_of_seed_and_step(seeds: list[int], step: int, few: int):
    drawn = draw_latents(torch.tensor(seeds), few + 1, SHAPE, step=step)
    for row, seed in zip(drawn, seeds, strict=True):
        assert torch.equal(row[:few], draw_latents(torch.tensor([seed]), few, SHAPE, step=step)[0])
    before, uniform = (draw(torch.tensor(seeds), few, step) for draw in (_drawn_before, _uniform))
    assert not any(torch.equal(row, other) for row in drawn[:, 0] for other in before[:, 0])
    assert not torch.equal(uniform, _uniform(torch.tensor(seeds), few, step - 1))
    assert torch.equal(uniform[:, :1], _uniform(torch.tensor(seeds), 1, step))


def _drawn_before(seeds: Tensor, count: int, step: int) -> Tensor:
    return draw_latents(seeds, count, SHAPE, step=step - 1)


def _uniform(seeds: Tensor, count: int, step: int) -> Tensor:
    return draw_uniform(seeds, (count,), step=step)


def test_noise_of_steps_is_uncorrelated_and_step_0_is_the_default():
    seeds = torch.arange(3)
    drawn = torch.stack([draw_latents(seeds, 2, (3, 20, 16), step=step) for step in range(30)]).double().flatten(1)
    assert torch.equal(draw_latents(seeds, 2, (3, 20, 16)).double().flatten(), drawn[0])
    correlation = (drawn[:-1] * drawn[1:]).mean().item()
    assert abs(correlation) < 5 * drawn[1:].numel() ** -0.5


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, bit=st.integers(0, 63))
def test_every_bit_of_the_seed_counts(seed: int, bit: int):
    flipped = (seed % 2**64) ^ (1 << bit)
    seeds = torch.tensor([seed, (flipped + 2**63) % 2**64 - 2**63])
    first, second = draw_latents(seeds, 1, SHAPE)
    assert not torch.equal(first, second)


def test_latents_are_float32_on_the_cpu_and_shaped_batch_latents_image():
    latents = draw_latents(torch.tensor([1, 2, 3]), 4, SHAPE)
    assert (latents.shape, latents.dtype, latents.device.type) == ((3, 4, *SHAPE), torch.float32, "cpu")


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


@settings(deadline=None, max_examples=50)
@given(
    first=st.lists(st.integers(-3, 3), min_size=1, max_size=3),
    second=st.lists(st.integers(-3, 3), min_size=1, max_size=3),
)
def test_each_tuple_of_words_is_a_stream_of_its_own(first: list[int], second: list[int]):
    assume(first != second)
    assert not torch.equal(numbers(*first), numbers(*second))


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


@settings(deadline=None, max_examples=30)
@given(seeds=st.lists(SEEDS, min_size=2, max_size=5))
def test_uniform_numbers_of_an_image_depend_on_its_seed_alone(seeds: list[int]):
    together = draw_uniform(torch.tensor(seeds), SHAPE)
    assert (together.shape, together.dtype, together.device.type) == ((len(seeds), *SHAPE), torch.float32, "cpu")
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, draw_uniform(torch.tensor([seed]), SHAPE)[0])


def test_uniform_numbers_are_uniform():
    """Mean, variance and quarters within five standard errors of 48000 draws."""
    drawn = draw_uniform(torch.arange(200), (3, 10, 8)).double()
    error = drawn.numel() ** -0.5
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean().item() - 1 / 2) < 5 * error * 12**-0.5
    assert abs((drawn - 0.5).square().mean().item() - 1 / 12) < 5 * error * 180**-0.5
    for quarter in range(4):
        share = ((drawn >= quarter / 4) & (drawn < (quarter + 1) / 4)).double().mean().item()
        assert abs(share - 0.25) < 5 * error * (3 / 16) ** 0.5


def test_uniform_numbers_of_neighbouring_seeds_are_uncorrelated():
    drawn = draw_uniform(torch.arange(50), (3, 20, 16)).double().flatten(1) - 0.5
    correlation = (drawn[:-1] * drawn[1:]).mean().item() * 12
    assert abs(correlation) < 5 * drawn[1:].numel() ** -0.5


@settings(deadline=None, max_examples=50)
@given(seeds=st.lists(SEEDS, min_size=2, max_size=4, unique=True), streams=st.tuples(SEEDS, SEEDS))
def test_derived_seeds_are_functions_of_seed_and_stream(seeds: list[int], streams: tuple[int, int]):
    assume(streams[0] != streams[1])
    first, second = (derived_seeds(torch.tensor(seeds), stream) for stream in streams)
    assert first.dtype == torch.int64
    assert len({*first.tolist(), *second.tolist()}) == 2 * len(seeds)
    for place, seed in enumerate(seeds):
        assert derived_seeds(torch.tensor([seed]), streams[0]).item() == first[place].item()


@settings(deadline=None, max_examples=20)
@given(words=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=3))
def test_isolated_draws_are_the_words_and_leave_no_trace(words: list[int]):
    before, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with isolated(*words):
            drawn.append(torch.rand(4))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    with isolated(*words, 1):
        assert not torch.equal(torch.rand(4), drawn[0])


def test_isolated_draws_do_not_depend_on_the_state_around():
    before = torch.get_rng_state()
    with isolated(3):
        expected = torch.rand(4)
        with isolated(4):
            inner = torch.rand(4)
        rest = torch.rand(4)
    with isolated(3):
        assert torch.equal(torch.rand(4), expected)
        assert torch.equal(torch.rand(4), rest)
    with isolated(4):
        assert torch.equal(torch.rand(4), inner)
    assert torch.equal(torch.get_rng_state(), before)
