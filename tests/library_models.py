"""Models for the tests of attack libraries: the embedded classifier, undefended and behind CMAP, and images."""

import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.embedded import load_classifier, load_test_images

EPS = 0.1
"""Large enough to break the undefended classifier on all of them."""


def images_and_labels(count: int = 4) -> tuple[Tensor, Tensor]:
    """The first images that the undefended classifier gets right."""
    images, labels = (part[:32] for part in load_test_images())
    with torch.no_grad():
        right = load_classifier()(images).argmax(dim=1) == labels
    return images[right][:count], labels[right][:count]


def undefended() -> nn.Module:
    return load_classifier()


def purified(seed: int | None = None) -> PurifiedClassifier:
    """Far too few iterations to defend, few enough for a test."""
    settings = CMAPSettings(n_latents=2, iterations=3, learning_rate=0.1)
    return PurifiedClassifier(load_classifier(), "fashion-mnist-ct", settings=settings, seed=seed).eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


def assert_legal_and_moved(found: Tensor, images: Tensor) -> None:
    """Valid images within EPS, each of them changed: a gradient of zero would have left one where it was."""
    assert found.shape == images.shape
    assert found.dtype == images.dtype
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - images).abs().max() <= EPS + 1e-6
    assert ((found - images).abs().flatten(1).amax(dim=1) > 0).all()


def traces(model: nn.Module) -> tuple[list[bool], list[str]]:
    """The traces that an attack could leave: the mode of each part, and the weights that have a gradient."""
    return [part.training for part in model.modules()], [n for n, p in model.named_parameters() if p.grad is not None]
