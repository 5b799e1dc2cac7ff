"""Threat models: projection onto the ball and the cube, distances, settings."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import labelled, linear
from cmap_defense.attacks import PGD, SPSA
from cmap_defense.detection.deep import DeepKernelSettings
from cmap_defense.errors import SettingsError
from cmap_defense.threat import ThreatModel
from toys import noise, uniform

SEEDS = st.integers(0, 2**31)
SHAPES = st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
MODELS = st.builds(
    ThreatModel, norm=st.just("l2"), eps=st.sampled_from([0.0, 1e-6, 0.5, 3.0, 100.0]) | st.floats(1e-6, 10)
) | st.builds(
    ThreatModel, norm=st.just("linf"), eps=st.sampled_from([0.0, 1e-6, 4 / 255, 8 / 255, 0.5, 1.0]) | st.floats(1e-6, 1)
)
SPREADS = st.sampled_from([0.0, 1e-4, 0.05, 1.0, 100.0])
TINY = 1e-12
"""Rounding in float64, for values up to 100."""


def pair(shape: tuple[int, ...], seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Any images and clean ones in [0, 1]; clean values touch 0 and 1."""
    clean = (1.4 * uniform(*shape, seed=seed, dtype=torch.float64) - 0.2).clamp(0, 1)
    return clean + spread * noise(*shape, seed=seed + 1, dtype=torch.float64), clean


@settings(deadline=None, max_examples=50)
@given(model=MODELS, shape=SHAPES, seed=SEEDS, spread=SPREADS)
def test_projected_images_lie_in_the_ball(model: ThreatModel, shape, seed: int, spread: float):
    images, clean = pair(shape, seed, spread)
    delta = (model.project(images, clean) - clean).flatten(1)
    distance = delta.abs().amax(dim=1) if model.norm == "linf" else delta.square().sum(dim=1).sqrt()
    assert (distance <= model.eps + TINY).all()


@settings(deadline=None, max_examples=50)
@given(model=MODELS, shape=SHAPES, seed=SEEDS, spread=SPREADS)
def test_projected_images_lie_in_the_unit_cube(model: ThreatModel, shape, seed: int, spread: float):
    projected = model.project(*pair(shape, seed, spread))
    assert projected.min().item() >= 0
    assert projected.max().item() <= 1


@settings(deadline=None, max_examples=50)
@given(model=MODELS, shape=SHAPES, seed=SEEDS, spread=SPREADS)
def test_projecting_twice_is_projecting_once(model: ThreatModel, shape, seed: int, spread: float):
    images, clean = pair(shape, seed, spread)
    once = model.project(images, clean)
    torch.testing.assert_close(model.project(once, clean), once, rtol=0, atol=TINY)


@settings(deadline=None, max_examples=50)
@given(model=MODELS, shape=SHAPES, seed=SEEDS)
def test_images_inside_stay_where_they_are(model: ThreatModel, shape, seed: int):
    clean = uniform(*shape, seed=seed, dtype=torch.float64)
    step = noise(*shape, seed=seed + 1, dtype=torch.float64)
    reach = step.flatten(1).abs().amax(dim=1) if model.norm == "linf" else step.flatten(1).norm(dim=1)
    size = 0.999 * model.eps * uniform(shape[0], seed=seed + 2, dtype=torch.float64)
    inside = (clean + step * (size / reach)[:, None, None, None]).clamp(0, 1)
    torch.testing.assert_close(model.project(inside, clean), inside, rtol=0, atol=TINY)


@settings(deadline=None, max_examples=30)
@given(model=MODELS, shape=SHAPES, seed=SEEDS, spread=SPREADS)
def test_images_of_a_batch_are_projected_as_if_each_were_alone(model: ThreatModel, shape, seed: int, spread: float):
    images, clean = pair(shape, seed, spread)
    alone = [model.project(images[b : b + 1], clean[b : b + 1]) for b in range(shape[0])]
    torch.testing.assert_close(model.project(images, clean), torch.cat(alone), rtol=0, atol=TINY)


def test_linf_clamps_every_element():
    clean = torch.full((2, 1, 1, 3), 0.5)
    images = torch.tensor([[0.45, 0.5, 0.9], [0.1, 0.52, 0.61]]).view(2, 1, 1, 3)
    expected = torch.tensor([[0.45, 0.5, 0.6], [0.4, 0.52, 0.6]]).view(2, 1, 1, 3)
    torch.testing.assert_close(ThreatModel(norm="linf", eps=0.1).project(images, clean), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_zero_leaves_the_clean_image_alone(norm: str):
    images, clean = pair((2, 3, 4, 5), 1, 1.0)
    assert torch.equal(ThreatModel(norm=norm, eps=0).project(images, clean), clean)


@settings(deadline=None, max_examples=30)
@given(model=MODELS, shape=SHAPES, seed=SEEDS, spread=SPREADS)
def test_distance_is_that_of_the_norm(model: ThreatModel, shape, seed: int, spread: float):
    images, clean = pair(shape, seed, spread)
    for value, image, origin in zip(model.distance(images, clean).tolist(), images, clean, strict=True):
        differences = [abs(v) for v in (image - origin).flatten().tolist()]
        expected = max(differences) if model.norm == "linf" else sum(v * v for v in differences) ** 0.5
        assert value == pytest.approx(expected, rel=1e-9, abs=TINY)


@settings(deadline=None, max_examples=30)
@given(model=MODELS)
def test_json_round_trip_is_exact(model: ThreatModel):
    assert ThreatModel.from_json(model.to_json()) == model


@pytest.mark.parametrize(
    "make",
    [
        lambda size: ThreatModel(eps=size),
        lambda size: ThreatModel(norm="l2", eps=0.5).replace(norm="linf", eps=size),
        lambda size: PGD(ThreatModel(), step_size=size),
        lambda size: SPSA(ThreatModel(), delta=size),
        lambda size: DeepKernelSettings(fgsm_eps=size),
    ],
)
def test_sizes_of_8_bit_images_are_refused_with_the_size_that_is_meant(make: Callable[[float], object]):
    with pytest.raises(SettingsError, match=r"in \[0, 1\].* is 8; did you mean 8/255\?"):
        make(8)
    with pytest.raises(SettingsError, match=r"is 1000\.$"):
        make(1000)
    make(1.0)


def test_an_l2_eps_larger_than_any_two_images_are_apart_is_refused():
    images, labels = labelled(2)
    largest = math.prod(images.shape[1:]) ** 0.5
    assert PGD(ThreatModel(norm="l2", eps=largest), steps=1)(linear, images, labels).images.shape == images.shape
    with pytest.raises(SettingsError, match=r"at most 12 apart in l2, but is 32; did you mean 32/255\?"):
        PGD(ThreatModel(norm="l2", eps=32), steps=1)(linear, images, labels)


def test_linf_has_a_default_size_and_l2_has_none():
    """8/255 in l2 is a ball in which nothing happens, and a headline about it would say nothing."""
    assert ThreatModel().eps == 8 / 255
    with pytest.raises(SettingsError, match=r"ThreatModel\.eps has no default in l2: give one, such as 0\.5"):
        ThreatModel(norm="l2")


def test_another_norm_takes_an_eps_of_its_own() -> None:
    linf, l2 = ThreatModel(eps=0.1), ThreatModel(norm="l2", eps=0.5)
    assert l2.replace(norm="linf").eps == 8 / 255
    assert linf.replace(norm="l2", eps=1.0).eps == 1.0
    assert (linf.replace(norm="linf").eps, l2.replace(eps=2.0).eps) == (0.1, 2.0)
    with pytest.raises(SettingsError, match="no default in l2"):
        linf.replace(norm="l2")
