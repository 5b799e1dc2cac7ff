"""Improved consistency training: its doubling schedule, its distribution of levels, its loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.training.objectives import ICT, Batch
from cmap_defense.training.objectives.ict import ict_loss
from toys import noise
from training import gaussian

LAST = math.nextafter(1.0, 0.0)
SCHEDULES = st.builds(
    lambda start, more: ICT(intervals_start=start, intervals_end=start + more), st.integers(1, 40), st.integers(0, 3000)
)


def test_the_number_of_levels_doubles_in_eight_equal_stages() -> None:
    counts = [ICT().level_count(k / 800) for k in range(800)]
    assert counts == [10 * 2**stage + 1 for stage in range(8) for _ in range(100)]


@pytest.mark.parametrize(("start", "end", "counts"), [(3, 20, [4, 7, 13, 21]), (5, 5, [6]), (4, 9, [5, 9])])
def test_the_last_stage_is_capped(start: int, end: int, counts: list[int]) -> None:
    """3, 6, 12, then 20 instead of 24; 4 and 8 never reach 9, since floor(9/4) = 2 leaves two stages."""
    settings = ICT(intervals_start=start, intervals_end=end)
    found = [settings.level_count(k / 1000) for k in range(1000)]
    assert sorted(set(found)) == counts


@given(settings=SCHEDULES, first=st.floats(0, LAST), second=st.floats(0, LAST))
def test_the_number_of_levels_rises_between_its_bounds(settings: ICT, first: float, second: float) -> None:
    low, high = sorted((first, second))
    start, end = settings.intervals_start, settings.intervals_end
    assert start + 1 <= settings.level_count(low) <= settings.level_count(high) <= end + 1
    assert settings.level_count(0.0) == start + 1
    assert 2 * settings.level_count(LAST) > end


@pytest.mark.parametrize("huber", [0.1, None])
def test_the_loss_is_its_formula(huber: float | None) -> None:
    images, z = noise(3, 2, 4, 5, seed=4, dtype=torch.float64), noise(3, 2, 4, 5, seed=5, dtype=torch.float64)
    t = torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64)
    r = torch.tensor([0.4, 1.0, 0.002], dtype=torch.float64)
    model = gaussian.GaussianConsistency()
    ahead = gaussian.at_levels(gaussian.plain_consistency, gaussian.plain_noisy(images, z, t), t)
    behind = gaussian.at_levels(gaussian.plain_consistency, gaussian.plain_noisy(images, z, r), r)
    c = 0.00054 * math.sqrt(2 * 4 * 5) if huber is None else huber
    expected = [
        distance / (upper - lower)
        for distance, upper, lower in zip(gaussian.plain_huber(ahead, behind, c), t.tolist(), r.tolist(), strict=True)
    ]
    assert ict_loss(model, model, images, z, t, r, huber=huber).tolist() == pytest.approx(expected, rel=1e-10)


def test_the_whole_loss_by_its_formula() -> None:
    """Levels from the table of the stage, interval by the cumulative probability, weight, distance."""
    progress, count = 0.3, 41  # stage floor(0.3 x 8) = 2
    uniform = torch.tensor([0.01, 0.4, 0.77, 0.995], dtype=torch.float64)
    images, z = gaussian.gaussian_images(4, 1), noise(4, 1, 2, 3, seed=2)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    table = [(low + i / (count - 1) * (high - low)) ** 7 for i in range(count)]
    erf = [math.erf((math.log(level) + 1.1) / (math.sqrt(2) * 2.0)) for level in table]
    cumulative = [(e - erf[0]) / (erf[-1] - erf[0]) for e in erf]
    index = [max(i for i in range(count - 1) if cumulative[i] <= u) for u in uniform.tolist()]
    t, r = (torch.tensor([table[i + k] for i in index], dtype=torch.float64) for k in (1, 0))
    ahead = gaussian.at_levels(gaussian.plain_consistency, gaussian.plain_noisy(images, z, t), t)
    behind = gaussian.at_levels(gaussian.plain_consistency, gaussian.plain_noisy(images, z, r), r)
    distances = gaussian.plain_huber(ahead, behind, 0.00054 * math.sqrt(6))
    expected = [d / (b - a) for d, a, b in zip(distances, r.tolist(), t.tolist(), strict=True)]

    model = gaussian.GaussianConsistency()
    found = ICT().losses(model, Batch(images, z, uniform, progress), gaussian.NOISE, model)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)  # differences of float32 images
    assert len(set(index)) == 4


def test_the_levels_come_from_the_stage() -> None:
    seen: list[Tensor] = []

    def model(noisy: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return noisy

    uniform = torch.linspace(0.001, 0.999, 300, dtype=torch.float64)
    batch = Batch(gaussian.gaussian_images(300, 1), noise(300, 1, 2, 3, seed=2), uniform, 0.0)
    ICT().losses(model, batch, gaussian.NOISE, model)
    assert len(seen[0].unique()) == 10
    assert len(seen[1].unique()) == 10
    assert seen[0].max() == pytest.approx(80.0)
    assert seen[1].min() == pytest.approx(0.002)
