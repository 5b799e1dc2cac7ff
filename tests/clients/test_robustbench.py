"""Architectures of RobustBench behind purifiers, on random weights; run where robustbench is installed.

pip install robustbench "setuptools<81" && pytest -m slow tests/clients/test_robustbench.py
"""

import importlib.util
import sys
from typing import Any

import pyautoattack
import pytest
import torch

from cmap_defense import PurifiedClassifier
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import DiffPure, OneStep, Purifier

if importlib.util.find_spec("robustbench") is None:
    pytest.skip("robustbench is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of the library

ARCHITECTURES = (
    "Sehwag2021Proxy_R18",
    "Rade2021Helper_R18_ddpm",
    "Wong2020Fast",
    "Standard",
    "Wang2023Better_WRN-28-10",
    "Hendrycks2019Using",
)
PURIFIERS = (OneStep(level=0.3, n_latents=2), DiffPure(t=20, step=0.01, n_latents=2))


@pytest.fixture(scope="module")
def zoo() -> Any:
    """RobustBench's table of CIFAR-10 models; its release imports AutoAttack by another name than it demands."""
    sys.modules.setdefault("autoattack", pyautoattack)
    sys.modules.setdefault("autoattack.state", pyautoattack.state)
    try:
        from robustbench.model_zoo.cifar10 import linf
    except ImportError as error:
        pytest.skip(f"robustbench cannot be imported here: {error}")
    return linf


@pytest.mark.parametrize("purifier", PURIFIERS, ids=["one-step", "diffpure"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_architectures_are_wrapped_and_attacked_exactly(zoo: Any, name: str, purifier: Purifier) -> None:
    classifier = zoo[name]["model"]().eval()
    model = PurifiedClassifier(classifier, "cifar10-edm-small", purifier=purifier, gradient=Unrolled(), seed=0).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model(images)
    assert logits.shape == (2, 10)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all(), "the gradient of each image reaches it"
