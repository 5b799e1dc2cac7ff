"""Distances between images against their formulas, number by number; LPIPS with networks that are small or random."""

import math
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.common.modules import building
from cmap_defense.errors import BackboneFileError, MissingExtraError, UnknownNameError
from cmap_defense.training.objectives import LPIPS, distances
from cmap_defense.training.objectives.distances import distance_named, l1, pseudo_huber, published_lpips, squared_l2
from toys import noise
from training.gaussian import plain_huber, plain_squares, rows

SHAPE = (3, 2, 5, 4)


def pair(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return scale * noise(*SHAPE, seed=1, dtype=dtype), scale * noise(*SHAPE, seed=2, dtype=dtype)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_norms_are_their_formulas(scale: float) -> None:
    a, b = pair(scale)
    absolute = [math.fsum(abs(p - q) for p, q in zip(x, y, strict=True)) for x, y in zip(rows(a), rows(b), strict=True)]
    assert squared_l2(a, b).tolist() == pytest.approx(plain_squares(rows(a), rows(b)), rel=2e-6)
    assert l1(a, b).tolist() == pytest.approx(absolute, rel=2e-6)


@pytest.mark.parametrize("c", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_pseudo_huber_is_its_formula(c: float, scale: float) -> None:
    a, b = pair(scale)
    assert pseudo_huber(a, b, c).tolist() == pytest.approx(plain_huber(rows(a), rows(b), c), rel=2e-6)


def test_pseudo_huber_without_a_constant_takes_that_of_the_images_size() -> None:
    a, b = pair(0.01)
    expected = plain_huber(rows(a), rows(b), 0.00054 * math.sqrt(2 * 5 * 4))
    assert pseudo_huber(a, b).tolist() == pytest.approx(expected, rel=2e-6)


@given(c=st.floats(1e-4, 10), scale=st.floats(1e-3, 100))
def test_pseudo_huber_lies_below_both_of_its_limits(c: float, scale: float) -> None:
    """||d||^2 / 2c near zero, ||d|| far away."""
    a, b = pair(scale, torch.float64)
    found, square = pseudo_huber(a, b, c), squared_l2(a, b)
    assert (found <= square.sqrt() * (1 + 1e-12)).all()
    assert (found <= square / (2 * c) * (1 + 1e-12)).all()
    assert (found >= square.sqrt() - c - 1e-9).all()


def test_pseudo_huber_of_equal_images_is_zero_and_has_a_gradient_there() -> None:
    a = noise(2, 1, 3, 4, seed=3).requires_grad_()
    found = pseudo_huber(a, a.detach().clone(), 0.03)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert (found == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["l2", "l1", "pseudo-huber"])
def test_half_precision_is_summed_in_float32(name: str) -> None:
    a, b = pair(dtype=torch.float64)
    distance = distance_named(name)
    assert distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert distance(a, b).dtype == torch.float64


def test_distances_by_name() -> None:
    a, b = pair()
    assert torch.equal(distance_named("l2")(a, b), squared_l2(a, b))
    assert torch.equal(distance_named("l1")(a, b), l1(a, b))
    assert torch.equal(distance_named("pseudo-huber")(a, b), pseudo_huber(a, b))
    assert torch.equal(distance_named("pseudo-huber", huber=0.3)(a, b), pseudo_huber(a, b, 0.3))
    assert distance_named("lpips", lpips=l1) is l1
    with pytest.raises(UnknownNameError, match="'pseudo-huber'"):
        distance_named("huber")


class Spy(nn.Module):
    """Sees what a network sees; the distances are mean squares, shaped as those of the lpips package."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.5)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.seen.append((a, b))
        assert not torch.is_autocast_enabled("cpu")
        return self.gain * self.drop(a - b).square().mean(dim=(1, 2, 3), keepdim=True)


def test_small_images_are_enlarged_bilinearly() -> None:
    a, b = noise(2, 3, 8, 6, seed=1), noise(2, 3, 8, 6, seed=2)
    spy = Spy()
    found = LPIPS(spy)(a, b)
    for seen, image in zip(spy.seen[0], (a, b), strict=True):
        expected = F.interpolate(image, size=(224, 224), mode="bilinear", align_corners=False)
        assert torch.equal(seen, expected)
    assert found.shape == (2,)


def test_grey_images_are_repeated() -> None:
    spy, a, b = Spy(), noise(2, 1, 8, 6, seed=1), noise(2, 1, 8, 6, seed=2)
    grey = LPIPS(spy)(a, b)
    torch.testing.assert_close(grey, LPIPS(spy)(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    assert spy.seen[0][0].shape[1] == 3


def test_the_network_is_in_eval_mode_and_frozen() -> None:
    spy = Spy().train()
    LPIPS(spy)
    assert not any(module.training for module in spy.modules())
    assert not any(parameter.requires_grad for parameter in spy.parameters())


def random_lpips() -> nn.Module:
    """The package's distance on a trunk of 700,000 random weights; the layers' weights are the package's."""
    import lpips

    with building(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)


def test_lpips_is_its_formula() -> None:
    """Eq. 1 of Zhang et al. 2018 from the activations of the trunk, in float64."""
    a, b = noise(2, 3, 20, 24, seed=1).tanh(), noise(2, 3, 20, 24, seed=2).tanh()
    network = random_lpips()
    found = LPIPS(network)(a, b)

    network.double()
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    activations = [
        network.net((F.interpolate(image.double(), size=(224, 224), mode="bilinear") - shift) / scale)
        for image in (a, b)
    ]
    expected = torch.zeros(2, dtype=torch.float64)
    for layer, of_a, of_b in zip(network.lins, *activations, strict=True):
        weights = layer.model[-1].weight[0, :, 0, 0]
        unit_a, unit_b = (y / y.square().sum(dim=1, keepdim=True).sqrt() for y in (of_a, of_b))
        difference = (unit_a - unit_b).square().nan_to_num()  # where no channel is active
        expected += torch.einsum("c,bchw->b", weights, difference) / difference[0, 0].numel()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    assert (expected > 0).all()


def test_lpips_of_equal_images_is_zero_and_its_sides_are_alike() -> None:
    a, b = noise(2, 1, 20, 24, seed=1).tanh(), noise(2, 1, 20, 24, seed=2).tanh()
    distance = LPIPS(random_lpips())
    assert (distance(a, a.clone()) == 0).all()
    torch.testing.assert_close(distance(a, b), distance(b, a))


VGG = "vgg16-397923af.pth"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torchvision's, from which no way leads outside."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingExtraError, match=r"cmap-defense\[train\]"):
        LPIPS()


def test_without_the_trunk_its_file_and_place_are_named(cache: Path) -> None:
    with pytest.raises(BackboneFileError) as caught:
        published_lpips()
    assert str(cache / VGG) in str(caught.value)
    assert f"https://download.pytorch.org/models/{VGG}" in str(caught.value)


def test_with_the_trunk_in_place_the_package_makes_the_published_distance(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quietly, in float32, whatever the caller's defaults are."""
    calls: list[dict[str, object]] = []

    def make(**arguments: object) -> nn.Module:
        warnings.warn("pretrained is deprecated", UserWarning, stacklevel=1)
        calls.append(arguments)
        return nn.Linear(2, 2)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=make))
    monkeypatch.setattr(distances, "sha256_of", lambda path: "397923af" + "0" * 56)
    (cache / VGG).write_bytes(b"weights")
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        network = published_lpips()
    finally:
        torch.set_default_dtype(torch.float32)
    assert calls == [{"net": "vgg", "verbose": False}]
    assert network.weight.dtype == torch.float32
    assert torch.equal(torch.random.get_rng_state(), state)
