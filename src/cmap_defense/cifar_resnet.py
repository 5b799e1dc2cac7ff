"""The CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2).

Names of the tensors: conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear. Where the shape changes, the shortcut
drops every second row and column and pads with zero channels ("option A"), so it has no weights.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmap_defense.errors import SettingsError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the classifiers normalise images in [0, 1] with, per channel."""


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
    """A ResNet for images of 32 x 32 pixels (He et al. 2016, arXiv 1512.03385, section 4.2).

    Images [B, 3, 32, 32] to logits [B, 10]. The names of its parameters are those that most published weights have.

    Args:
        depth: 6 n + 2 layers: 20, 32, 44, 56 or 110.
        unit: whether images are in [0, 1] and are normalised in here; otherwise they come normalised with ``MEAN`` and
            ``STD``. The weights are the same.

    Raises:
        SettingsError: the depth is not 6 n + 2.
    """

    def __init__(self, depth: int, *, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit
        for name, values in (("mean", MEAN), ("std", STD)) if unit else ():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise SettingsError(f"CifarResNet.depth must be 6 n + 2 with n of at least 1, but is {depth}.")
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
