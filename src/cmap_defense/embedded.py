"""What ships with the package beside the backbones: three small Fashion-MNIST classifiers and 256 test images.

Enough to try the defence, and to attack it, with no network.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmap_defense.common.settings import require_choice

CLASSIFIERS = ("fashion-mnist", "fashion-mnist-adapted", "fashion-mnist-adversarial")
"""Names for ``load_classifier``."""

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


def load_classifier(name: str = "fashion-mnist") -> FashionCNN:
    """An embedded classifier, in eval mode, on the CPU.

    Args:
        name: "fashion-mnist", an ordinary one that has seen neither attacks nor purified images, or
            "fashion-mnist-adapted", the same adversarially adapted to ``OneStep(level=0.6)`` on "fashion-mnist-ct", or
            "fashion-mnist-adversarial", the same adversarially trained for as long without a purifier. Both know
            attacks of linf 0.05.

    Raises:
        SettingsError: there is none of this name.
    """
    require_choice("load_classifier", "name", name, CLASSIFIERS)
    classifier, folder = FashionCNN(), ASSETS.parent / name
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
