"""The CIFAR ResNets of the package, for weights that others have trained.

    cmap-defense quality --backbone cifar10-cd --data cifar10 --out runs/quality \\
        --classifier examples/cifar_resnet.py:unit_resnet20 --weights cifar10_resnet20.safetensors \\
        --other resnet56=examples/cifar_resnet.py:unit_resnet56@cifar10_resnet56.safetensors

The weights by Y. Idelbayev (BSD-2) fit. ``unit_resnet20`` and ``unit_resnet56`` take images in [0, 1] and normalise
them; ``resnet20`` and ``resnet56`` need ``--mean`` and ``--std``.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from cmap_defense.cifar_resnet import MEAN, STD, CifarResNet

__all__ = ["MEAN", "STD", "CifarResNet"]


def resnet20() -> CifarResNet:
    """For ``cmap-defense evaluate --classifier examples/cifar_resnet.py:resnet20 --weights FILE``; untrained.

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
