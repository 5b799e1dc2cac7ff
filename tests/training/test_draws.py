"""The input of a step: functions of (seed, step), whatever processes share the batch, and wherever the images are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.common.ranks import Ranks
from cmap_defense.common.rng import generator_for
from cmap_defense.training import draws as draws_module
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.draws import Draws, image_indices
from cmap_defense.training.objectives import Batch

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (23, 2, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23) * 3


def draws(team: Ranks | None = None, *, labels: Tensor | None = LABELS, **changes: object) -> Draws:
    config = TrainingConfig(images=1000, batch_size=10).replace(**changes)
    return Draws(IMAGES, labels, config, CPU, team or Ranks())


def tensors(batch: Batch) -> list[Tensor]:
    assert batch.labels is not None
    return [batch.images, batch.z, batch.uniform, batch.labels]


@settings(deadline=None, max_examples=30)
@given(world=st.integers(2, 5), size=st.integers(5, 12), seed=st.integers(0, 2**40), step=st.integers(0, 10**6))
def test_processes_share_what_one_would_draw(world: int, size: int, seed: int, step: int) -> None:
    """Rank r has rows r, r + world, ...; together they have all of them once."""
    changes = {"batch_size": size, "seed": seed}
    whole = tensors(draws(**changes)(step))
    for rank in range(world):
        part = tensors(draws(Ranks(rank, world), **changes)(step))
        for found, expected in zip(part, whole, strict=True):
            assert torch.equal(found, expected[rank::world])


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    used = draws()
    for step in (3, 0, 7, 3):
        for found, expected in zip(tensors(used(step)), tensors(draws()(step)), strict=True):
            assert torch.equal(found, expected)
    assert not torch.equal(draws()(3).z, draws()(4).z)
    assert not torch.equal(draws()(3).z, draws(seed=1)(3).z)


def test_it_is_its_plain_program() -> None:
    """Flips, then numbers, then noise, from one generator; images in [-1, 1] in the data's order."""
    batch = draws(seed=5)(7)
    assert batch.labels is not None
    generator = generator_for(5, 2, 7)
    chosen = image_indices(7, 10, 23, 5)
    expected = IMAGES[chosen].double() / 127.5 - 1
    mirrored = torch.rand(10, generator=generator) < 0.5
    expected[mirrored] = expected[mirrored].flip(-1)
    assert 0 < mirrored.sum() < 10
    torch.testing.assert_close(batch.images.double(), expected, rtol=0, atol=1e-7)
    assert torch.equal(batch.uniform, torch.rand(10, generator=generator, dtype=torch.float64))
    assert torch.equal(batch.z, torch.randn(10, 2, 5, 3, generator=generator))
    assert torch.equal(batch.labels, LABELS[chosen])
    assert batch.progress == 7 / 100
    assert (batch.images.dtype, batch.z.dtype, batch.uniform.dtype) == (torch.float32, torch.float32, torch.float64)


def test_numbers_are_uniform_and_noise_is_normal() -> None:
    batch = draws(batch_size=20_000)(0)
    low, high = batch.uniform.aminmax()
    assert 0 < low < 1e-3
    assert 1 - 1e-3 < high < 1
    assert batch.uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert batch.z.mean().item() == pytest.approx(0.0, abs=0.01)
    assert batch.z.std().item() == pytest.approx(1.0, abs=0.01)
    assert torch.corrcoef(torch.stack([batch.uniform, batch.z[:, 0, 0, 0].double()]))[0, 1].abs() < 0.03


@pytest.mark.parametrize("labels", [LABELS, None])
def test_some_rows_of_a_batch_keep_together(labels: Tensor | None) -> None:
    whole = draws(labels=labels)(0)
    part = whole.rows(slice(2, 5))
    for name in ("images", "z", "uniform") if labels is None else ("images", "z", "uniform", "labels"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:5]), name
    assert (part.labels is None, part.progress) == (labels is None, whole.progress)


LENGTHS, BATCHES, SEEDS = st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**63)


def stream(length: int, size: int, seed: int, count: int) -> list[int]:
    """The first ``count`` indices, batch after batch."""
    return torch.cat([image_indices(step, size, length, seed) for step in range(-(-count // size))]).tolist()[:count]


@settings(deadline=None, max_examples=30)
@given(length=LENGTHS, sizes=st.tuples(BATCHES, BATCHES), seed=SEEDS)
def test_every_epoch_is_a_permutation_whatever_the_batch_size(length: int, sizes: tuple[int, int], seed: int) -> None:
    indices, others = (stream(length, size, seed, 3 * length + 3) for size in sizes)
    assert indices == others
    for epoch in range(3):
        assert sorted(indices[epoch * length : (epoch + 1) * length]) == list(range(length))


@settings(deadline=None, max_examples=30)
@given(length=LENGTHS, size=BATCHES, seed=SEEDS, steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(length: int, size: int, seed: int, steps: list[int]) -> None:
    """Whatever was drawn before, in whatever order; it has its size, and indices of images."""
    before = [image_indices(step, size, length, seed) for step in steps]
    draws_module._permutation.cache_clear()
    for step, batch in reversed(list(zip(steps, before, strict=True))):
        assert torch.equal(image_indices(step, size, length, seed), batch)
        assert (batch.shape, batch.dtype) == ((size,), torch.int64)
        assert batch.min() >= 0
        assert batch.max() < length


@pytest.mark.gpu
def test_held_or_sent_a_gpu_gets_the_same() -> None:
    device = torch.device("cuda:0")
    config = TrainingConfig(images=1000, batch_size=10)
    held, sent = (Draws(IMAGES, LABELS, config.replace(hold_images=hold), device, Ranks()) for hold in (True, False))
    for found, expected in zip(tensors(held(3)), tensors(sent(3)), strict=True):
        assert found.device == device
        assert torch.equal(found, expected)
    assert torch.equal(tensors(held(3))[-1], tensors(draws()(3))[-1].to(device))
