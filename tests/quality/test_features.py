"""The features of a classifier: which layer, which images it sees, what is left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from attack_toys import linear, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.common.modules import building
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.errors import ClassifierError, SettingsError
from cmap_defense.quality import find_features, read_features
from toys import ToyBackbone, uniform

IMAGES = uniform(3, 3, 8, 6, seed=0)


class Heads(nn.Module):
    """A layer that is registered last and never called, one that is called last and registered first, one within."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 4)
        self.within = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU())
        self.convolution = nn.Conv2d(3, 2, 3)
        self.unused = nn.Linear(7, 4)

    def forward(self, images: Tensor) -> Tensor:
        self.convolution(images)
        return self.last(input=self.within(images))


@pytest.fixture
def heads() -> PurifiedClassifier:
    with building():
        torch.manual_seed(0)
        return wrapped(classifier=Heads())


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in module.modules())


def test_the_embedded_classifier() -> None:
    classifier = load_classifier()
    model = PurifiedClassifier(classifier, "fashion-mnist-ct").eval()
    images = load_test_images()[0][:3]
    layer = find_features(model, images)
    assert layer == "head"
    found = read_features(model, images, layer)
    torch.testing.assert_close(found, classifier.features(images).mean(dim=(2, 3)))
    torch.testing.assert_close(classifier.head(found), classifier(images))
    assert not found.requires_grad
    assert hooks_of(classifier) == 0


def test_a_resnet_of_torchvision_with_its_normalisation() -> None:
    with building():
        torch.manual_seed(0)
        classifier = resnet18(num_classes=4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = wrapped(classifier=classifier.train(), normalize=(mean, std))
    before = {name: part.clone() for name, part in classifier.state_dict().items()}
    layer = find_features(model, IMAGES)
    assert layer == "fc"
    found = read_features(model, IMAGES, layer)
    assert all(part.training for part in classifier.modules())
    assert all(torch.equal(part, before[name]) for name, part in classifier.state_dict().items())
    given = (IMAGES - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    body = nn.Sequential(*list(classifier.children())[:-1]).eval()
    torch.testing.assert_close(found, body(given).flatten(1).detach())


def test_the_last_layer_is_the_one_called_last(heads: PurifiedClassifier) -> None:
    assert find_features(heads, IMAGES) == "last"
    layer = find_features(heads, IMAGES, "within.1")
    assert layer == "within.1"
    torch.testing.assert_close(read_features(heads, IMAGES, layer), IMAGES.flatten(1))


def test_maps_are_averaged(heads: PurifiedClassifier) -> None:
    layer = find_features(heads, IMAGES, "convolution")
    assert layer == "convolution"
    torch.testing.assert_close(read_features(heads, IMAGES, layer), IMAGES.mean(dim=(2, 3)))


class Strange(nn.Module):
    """Gives its linear layer what is no vector."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4) if isinstance(given, Tensor) else nn.Identity()
        self.given = given

    def forward(self, images: Tensor) -> Tensor:
        self.inner(self.given)
        return linear(images)


def test_where_there_are_none() -> None:
    with pytest.raises(ClassifierError, match=r"inside an nn\.Module, but the classifier is function"):
        find_features(PurifiedClassifier(linear, ToyBackbone()), IMAGES)
    with pytest.raises(ClassifierError, match=r"called no nn\.Linear"):
        find_features(wrapped(), IMAGES)
    with pytest.raises(ClassifierError, match=r"\[3, d\] or \[3, d, H, W\], but is \[3, 8, 6\]"):
        read_features(wrapped(classifier=Strange(IMAGES[:, 0])), IMAGES, "inner")
    with pytest.raises(ClassifierError, match=r"but is \[2, 6\]"):
        read_features(wrapped(classifier=Strange(torch.zeros(2, 6))), IMAGES, "inner")
    with pytest.raises(ClassifierError, match="but is str"):
        read_features(wrapped(classifier=Strange("text")), IMAGES, "inner")


def test_names(heads: PurifiedClassifier) -> None:
    with pytest.raises(SettingsError, match=r"no module 'lost'\. Did you mean 'last'"):
        find_features(heads, IMAGES, "lost")
    with pytest.raises(ClassifierError, match="did not call its module 'unused'"):
        find_features(heads, IMAGES, "unused")
    with pytest.raises(ClassifierError, match="did not call its module 'unused'"):
        read_features(heads, IMAGES, "unused")


def test_hooks_are_gone_after_a_failing_run(heads: PurifiedClassifier) -> None:
    classifier = heads.classifier
    assert isinstance(classifier, Heads)
    classifier.within = nn.Sequential(nn.Flatten(), nn.Linear(9, 5))
    with pytest.raises(RuntimeError):
        find_features(heads, IMAGES)
    assert hooks_of(classifier) == 0
