"""torch.compile and DataParallel around the parts of the defence: they work, or the error has what works."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_toys import QUICK, Denoiser, Linear, labelled, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.errors import BackboneError
from toys import CountingCompiler, ToyBackbone

pytestmark = pytest.mark.filterwarnings("ignore")
"""The compiler warns about what it leaves to Python, and fails where its own warnings are errors."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Network(nn.Module):
    """F(x, noise level) of a consistency model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor, level: Tensor) -> Tensor:
        return torch.tanh(self.conv(images)) * (1 + level[:, None, None, None])


def karras() -> ConsistencyBackbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConsistencyBackbone(Network(), (3, 8, 6)).eval()


@pytest.mark.parametrize("made", [karras, ToyBackbone], ids=["network", "generate"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_backbone_is_refused_with_the_way_that_works(made: Any, in_place: bool) -> None:
    images, counting = labelled(2)[0], CountingCompiler()
    expected = wrapped(backbone=made(), seed=0)(images)
    backbone = made()
    compiled = torch.compile(backbone, backend=counting)
    if in_place:
        compiled = made()
        compiled.compile(backend=counting)
    with pytest.raises(BackboneError, match="only its generate is called") as caught:
        PurifiedClassifier(Linear(), compiled)
    line = re.search(r"passed on: (.*)\.$", str(caught.value))
    assert line is not None
    way = line.group(1).replace("compile(", "compile(backend=counting, ").replace(", )", ")")
    way = re.sub(r"compile\(backend=counting, (backbone\.generate)\)", r"compile(\1, backend=counting)", way)
    exec(way, {"backbone": backbone, "torch": torch, "counting": counting})
    model = wrapped(backbone=backbone, seed=0)
    torch.testing.assert_close(model(images), expected)
    assert counting.graphs > 0
    assert len(counting.sizes) >= model.settings.iterations


def test_a_distributed_backbone_is_refused_with_the_way_that_works() -> None:
    with pytest.raises(BackboneError, match=r"nn.DataParallel\(PurifiedClassifier"):
        wrapped(backbone=nn.DataParallel(ToyBackbone()))
    model, images = wrapped(seed=0), labelled(2)[0]
    assert torch.equal(nn.DataParallel(model)(images), model(images))


def test_a_compiled_classifier_is_compiled() -> None:
    images, counting = labelled(2)[0], CountingCompiler()
    compiled: Any = torch.compile(Linear(), backend=counting)
    model = PurifiedClassifier(compiled, Denoiser(), settings=QUICK, seed=0)
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    torch.testing.assert_close(logits, wrapped(seed=0)(images))
    assert counting.graphs > 0
    assert torch.autograd.grad(logits.sum(), leaf)[0].abs().sum() > 0
    assert not model.eval().classifier.training


def test_a_compiled_wrapper_gives_the_same_result() -> None:
    images, counting = labelled(2)[0], CountingCompiler()
    model = wrapped(seed=0, settings=QUICK.replace(n_latents=1, iterations=1))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=counting)(images), model(images))
    assert counting.graphs > 0
