"""What ships with the package beside the backbones: small classifiers, and 256 test images of Fashion-MNIST.

Enough to try the defence, and to attack it, with no network.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmap_defense.cifar_resnet import CifarResNet
from cmap_defense.common.settings import require_choice

ASSETS = Path(__file__).parent / "assets" / "fashion-mnist"

CLASS_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class FashionCNN(nn.Module):
    """Six convolutions in three stages, global average pooling, one linear layer.

    Images [B, 1, 28, 28] in [0, 1] to logits [B, 10].
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


_RESNET20 = functools.partial(CifarResNet, 20, unit=True)
_ARCHITECTURES: Mapping[str, Callable[[], FashionCNN | CifarResNet]] = {
    "fashion-mnist": FashionCNN,
    "fashion-mnist-adapted": FashionCNN,
    "fashion-mnist-adversarial": FashionCNN,
    "cifar10-adapted": _RESNET20,
    "cifar10-adversarial": _RESNET20,
}

CLASSIFIERS = tuple(_ARCHITECTURES)
"""Names for ``load_classifier``."""


def load_classifier(name: str = "fashion-mnist") -> FashionCNN | CifarResNet:
    """An embedded classifier of images in [0, 1], in eval mode, on the CPU.

    Args:
        name: "fashion-mnist", an ordinary one that has seen neither attacks nor purified images;
            "fashion-mnist-adapted", the same adversarially adapted to ``OneStep(level=0.6)`` on "fashion-mnist-ct";
            "fashion-mnist-adversarial", the same adversarially trained for as long without a purifier;
            "cifar10-adapted" and "cifar10-adversarial", a ResNet-20 adversarially adapted to ``OneStep(level=0.3)`` on
            "cifar10-edm-small", and adversarially trained for as long without a purifier. They know attacks of linf
            0.05 for Fashion-MNIST and of 8/255 for CIFAR-10.

    Raises:
        SettingsError: there is none of this name.
    """
    require_choice("load_classifier", "name", name, CLASSIFIERS)
    classifier, folder = _ARCHITECTURES[name](), ASSETS.parent / name
    weights = load_file(folder / "classifier.safetensors")
    classifier.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in weights.items()})
    if (folder / "adaptation.json").exists():
        record = json.loads((folder / "adaptation.json").read_text(encoding="utf-8"))
        vars(classifier)["adapted_to"] = {key: record[key] for key in ("purifier", "backbone")}
    return classifier.eval()


def load_test_images() -> tuple[Tensor, Tensor]:
    """The first 256 test images of Fashion-MNIST: images float32 [256, 1, 28, 28] in [0, 1], labels int64 [256]."""
    with np.load(ASSETS / "test256.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    return torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels).long()
