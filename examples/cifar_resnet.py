"""The CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2), for weights that others have trained.

    cmap-defense quality --backbone cifar10-cd --data cifar10 --out runs/quality \\
        --classifier cifar_resnet.py:unit_resnet20 --weights cifar10_resnet20.safetensors \\
        --other resnet56=cifar_resnet.py:unit_resnet56@cifar10_resnet56.safetensors

Names of the tensors: conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear. Where the shape changes, the shortcut
drops every second row and column and pads with zero channels ("option A"), so it has no weights.
"""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the weights by Y. Idelbayev (BSD-2) want their images in [0, 1] normalised with."""


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(h + shortcut)


class CifarResNet(nn.Module):
    """Images [B, 3, 32, 32] to logits [B, 10]. depth: 20, 32, 44, 56 or 110.

    unit: whether images are in [0, 1] and are normalised in here; otherwise they come normalised with MEAN and STD. The
    weights are the same.
    """

    def __init__(self, depth: int, *, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit
        for name, values in (("mean", MEAN), ("std", STD)) if unit else ():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2, but is {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, channels in enumerate((16, 32, 64), start=1):
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(blocks):
                parts[str(i)] = Block(width, channels, 2 if stage > 1 and i == 0 else 1)
                width = channels
            self.add_module(f"layer{stage}", nn.Sequential(parts))
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.unit:
            x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        h = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            h = self.get_submodule(f"layer{stage}")(h)
        return self.linear(h.mean(dim=(2, 3)))


def resnet20() -> CifarResNet:
    """For ``cmap-defense evaluate --classifier cifar_resnet.py:resnet20 --weights FILE``; untrained.

    With ``--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225``.
    """
    return CifarResNet(20)


def resnet56() -> CifarResNet:
    """As :func:`resnet20`, deeper."""
    return CifarResNet(56)


def unit_resnet20() -> CifarResNet:
    """As :func:`resnet20` with images in [0, 1], so that it needs no ``--mean`` and ``--std``."""
    return CifarResNet(20, unit=True)


def unit_resnet56() -> CifarResNet:
    """As :func:`unit_resnet20`, deeper."""
    return CifarResNet(56, unit=True)


def load_cifar_resnet(path: Path, depth: int, *, unit: bool = False) -> CifarResNet:
    """A trained classifier in eval mode."""
    classifier = CifarResNet(depth, unit=unit)
    state = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("num_batches_tracked")}
    with torch.no_grad():
        missing, unexpected = classifier.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit a ResNet-{depth}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return classifier.eval()
