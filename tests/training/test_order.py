"""The order of the training images: laws that every seed, length and batch size must obey."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmap_defense.training.order import DataOrder

LENGTHS, BATCHES, SEEDS = st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**63)


def stream(order: DataOrder, count: int) -> list[int]:
    """The first ``count`` indices, batch after batch."""
    steps = -(-count // order.batch_size)
    return torch.cat([order.batch(step) for step in range(steps)]).tolist()[:count]


@settings(deadline=None, max_examples=50)
@given(length=LENGTHS, batch_size=BATCHES, seed=SEEDS)
def test_every_epoch_is_a_permutation(length: int, batch_size: int, seed: int) -> None:
    indices = stream(DataOrder(length, batch_size, seed), 3 * length)
    for epoch in range(3):
        assert sorted(indices[epoch * length : (epoch + 1) * length]) == list(range(length))


@settings(deadline=None, max_examples=50)
@given(length=LENGTHS, batch_size=BATCHES, seed=SEEDS, step=st.integers(0, 10**6))
def test_a_batch_has_its_size_and_indices_in_range(length: int, batch_size: int, seed: int, step: int) -> None:
    batch = DataOrder(length, batch_size, seed).batch(step)
    assert batch.shape == (batch_size,)
    assert batch.dtype == torch.int64
    assert batch.min() >= 0
    assert batch.max() < length


@settings(deadline=None, max_examples=50)
@given(length=LENGTHS, batch_size=BATCHES, seed=SEEDS, steps=st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(length: int, batch_size: int, seed: int, steps: list[int]) -> None:
    """Whatever was asked for before, in whatever order, forwards or backwards."""
    used = DataOrder(length, batch_size, seed)
    for step in steps:
        assert torch.equal(used.batch(step), DataOrder(length, batch_size, seed).batch(step))


@settings(deadline=None, max_examples=50)
@given(length=LENGTHS, seed=SEEDS, sizes=st.tuples(BATCHES, BATCHES))
def test_the_stream_does_not_depend_on_the_batch_size(length: int, seed: int, sizes: tuple[int, int]) -> None:
    one, other = (stream(DataOrder(length, size, seed), 2 * length + 3) for size in sizes)
    assert one == other


def test_epochs_and_seeds_differ() -> None:
    first = DataOrder(1000, 1000, 0)
    assert not torch.equal(first.batch(0), first.batch(1))
    assert not torch.equal(first.batch(0), DataOrder(1000, 1000, 1).batch(0))


def test_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    DataOrder(10, 4, 0).batch(7)
    assert torch.equal(torch.random.get_rng_state(), state)
