"""What holds for every objective: the table of names, records, and losses that belong to images alone."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.errors import SettingsError
from cmap_defense.training.objectives import OBJECTIVES, Batch, Objective
from toys import noise
from training.gaussian import NOISE, GaussianConsistency, GaussianDenoiser, drawn, gaussian_images

NAMES = sorted(OBJECTIVES)


def made(name: str, teacher: Any = None, **settings: Any) -> Objective:
    teaching = {"teacher": teacher or GaussianDenoiser(), "teacher_source": {"name": "exact"}}
    return OBJECTIVES[name](**settings, **teaching if name == "cd" else {})


def test_the_table_holds_every_objective() -> None:
    assert NAMES == ["cd", "ct", "ect", "edm", "ict"]
    assert {name: objective.kind for name, objective in OBJECTIVES.items()} == {
        name: "denoiser" if name == "edm" else "consistency" for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_description_is_json_and_holds_the_settings(name: str) -> None:
    objective = made(name)
    described = json.loads(json.dumps(objective.describe()))
    assert described.pop("name") == name
    assert described.pop("teacher", None) == ("exact" if name == "cd" else None)
    assert described == objective.to_dict()
    assert objective.replace(**described) == objective
    assert objective.sources == ({"teacher": {"name": "exact"}} if name == "cd" else {})


@pytest.mark.parametrize(
    ("name", "progress", "count"),
    [("cd", 0.4, 18), ("ct", 0.0, 2), ("ct", 0.25, 101), ("ct", math.nextafter(1.0, 0.0), 201)],
)
def test_the_levels_of_a_table_are_neighbours_drawn_uniformly(name: str, progress: float, count: int) -> None:
    uniform = torch.tensor([0.003, 0.26, 0.5, 0.75, 0.999], dtype=torch.float64)
    seen: list[Tensor] = []

    def model(noisy: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return noisy

    batch = Batch(gaussian_images(5, 1), noise(5, 1, 2, 3, seed=2), uniform, progress)
    made(name).losses(model, batch, NOISE, model)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    table = [(low + i / (count - 1) * (high - low)) ** 7 for i in range(count)]
    index = [math.floor(u * (count - 1)) for u in uniform.tolist()]
    assert seen[0].tolist() == pytest.approx([table[i + 1] for i in index], rel=1e-6)
    assert seen[1].tolist() == pytest.approx([table[i] for i in index], rel=1e-6)


@pytest.mark.parametrize("wrong", [{"huber": 0.0, "distance": "pseudo-huber"}, {"lpips": 3}])
def test_settings_that_do_not_fit_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        made("cd", **wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_a_function_of_the_batch_alone(name: str) -> None:
    images, objective, model = gaussian_images(5, 1), made(name), GaussianConsistency()
    state = torch.random.get_rng_state()
    first = objective.losses(model, drawn(images, 0.5, 1, 2), NOISE, model)
    again = objective.losses(model, drawn(images, 0.5, 1, 2), NOISE, model)
    assert torch.equal(again, first)
    assert not torch.equal(objective.losses(model, drawn(images, 0.5, 1, 3), NOISE, model), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (5,)
    assert torch.isfinite(first).all()
    assert (first >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_its_loss_whoever_shares_the_batch(name: str) -> None:
    """Two processes that take every other image find what one finds."""
    objective, model, whole = made(name), GaussianConsistency(0.1, 0.8), drawn(gaussian_images(6, 1), 0.6, 1, 2)
    together = objective.losses(model, whole, NOISE, model)
    for rank in range(2):
        share = Batch(whole.images[rank::2], whole.z[rank::2], whole.uniform[rank::2], whole.progress)
        torch.testing.assert_close(objective.losses(model, share, NOISE, model), together[rank::2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_float32_network_is_float32(name: str) -> None:
    def model(noisy: Tensor, sigma: Tensor) -> Tensor:
        assert noisy.dtype == sigma.dtype == torch.float32
        return noisy / (1 + sigma[:, None, None, None])

    losses = made(name, model).losses(model, drawn(gaussian_images(4, 1), 0.6, 1, 2), NOISE, model)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
@given(progress=st.floats(0, 1, exclude_max=True), uniform=st.lists(st.floats(1e-9, 1 - 1e-9), min_size=2, max_size=6))
def test_the_levels_lie_in_the_noise_range_and_the_targets_below(
    name: str, progress: float, uniform: list[float]
) -> None:
    seen: dict[str, Tensor] = {}

    def watched(role: str):
        def call(noisy: Tensor, sigma: Tensor) -> Tensor:
            seen[role] = sigma
            return noisy

        return call

    count = len(uniform)
    batch = Batch(
        gaussian_images(count, 1), noise(count, 1, 2, 3, seed=2), torch.tensor(uniform, dtype=torch.float64), progress
    )
    made(name).losses(watched("model"), batch, NOISE, watched("target"))
    for sigma in seen.values():
        assert (sigma >= torch.tensor(NOISE.sigma_min)).all()
        assert (sigma <= NOISE.sigma_max).all()
    if name == "edm":
        assert list(seen) == ["model"]
    else:
        assert (seen["target"] < seen["model"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_the_model_is_trained(name: str) -> None:
    model, target, teacher = GaussianConsistency(0.1, 0.8), GaussianConsistency(0.2, 0.6), GaussianDenoiser()
    losses = made(name, teacher).losses(model, drawn(gaussian_images(4, 1), 0.6, 1, 2), NOISE, target)
    losses.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert math.isfinite(parameter.grad)
        assert parameter.grad != 0
    for parameter in (*target.parameters(), *teacher.parameters()):
        assert parameter.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_losses_on_a_gpu_are_those_on_the_cpu(name: str) -> None:
    batch = drawn(gaussian_images(6, 1), 0.6, 1, 2)
    there = Batch(batch.images.cuda(), batch.z.cuda(), batch.uniform.cuda(), batch.progress)

    def model(noisy: Tensor, sigma: Tensor) -> Tensor:
        return noisy.double() / (1 + sigma.double()[:, None, None, None])

    objective = made(name, model)
    expected = objective.losses(model, batch, NOISE, model)
    torch.testing.assert_close(objective.losses(model, there, NOISE, model).cpu(), expected, rtol=1e-4, atol=1e-7)
