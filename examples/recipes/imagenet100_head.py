"""A new last layer for torchvision's classifiers, for images of 64 x 64 and the classes of a folder.

    python examples/recipes/imagenet100_head.py --data IMAGENET100 --model resnet50 --out runs/head --device cuda

The CMAP paper does this with ResNet-50, ResNet-101 and WRN-50-2 on ImageNet-100. Everything but the last layer keeps
its ImageNet weights and its statistics, so each image goes through the network once; the layer is then trained on the
features. It writes OUT/MODEL.safetensors, whose factories stand below:

    cmap-defense evaluate --classifier examples/recipes/imagenet100_head.py:resnet50 \\
        --weights runs/head/resnet50.safetensors --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
        --data IMAGENET100 --size 64 ...
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from cmap_defense.data import FolderImages, ImageSource, open_dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = int(os.environ.get("CLASSES", "100"))  # of another data set than ImageNet-100
NETWORKS = ("resnet50", "resnet101", "wide_resnet50_2")


def resnet50() -> nn.Module:
    """For --classifier; its weights come from --weights."""
    return models.resnet50(num_classes=CLASSES)


def resnet101() -> nn.Module:
    """As above."""
    return models.resnet101(num_classes=CLASSES)


def wide_resnet50_2() -> nn.Module:
    """As above."""
    return models.wide_resnet50_2(num_classes=CLASSES)


@torch.no_grad()
def features(network: nn.Module, data: ImageSource, batch_size: int, device: str, *, mirrored: bool) -> Tensor:
    """What the last layer sees of each image, [N, D] on the CPU; for the images as they are, or mirrored."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    found = []
    for rows in torch.arange(len(data)).split(batch_size):
        images = data.select(rows).unit.to(device)
        found.append(network(((images.flip(-1) if mirrored else images) - mean) / std).float().cpu())
    return torch.cat(found)


def fit(layer: nn.Linear, inputs: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Train the layer by SGD with momentum, a cosine and weight decay."""
    optimiser = torch.optim.SGD(layer.parameters(), lr=options.learning_rate, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(options.seed)
    steps = options.epochs * math.ceil(len(inputs) / options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(options.batch_size):
            loss = F.cross_entropy(layer(inputs[rows].to(options.device)), labels[rows].to(options.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with train and test (or val), of class folders")
    parser.add_argument("--model", choices=NETWORKS, default="resnet50")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument(
        "--no-pretrained", action="store_true", help="random weights, to try the recipe without a network"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = (open_dataset(options.data, split, size=options.size, channels=3) for split in ("train", "test"))
    if not isinstance(train, FolderImages) or not isinstance(test, FolderImages) or train.paths == test.paths:
        parser.error("--data must be a folder with the folders train and test (or val), of class folders each")
    if train.class_names is None or test.class_names is None:
        parser.error("--data has images outside of class folders, whose classes are not known")
    if train.class_names != test.class_names:
        parser.error("--data has other classes in train than in test")
    if len(train.class_names) != CLASSES:
        parser.error(
            f"--data has {len(train.class_names)} classes, not {CLASSES}: say so in the environment, CLASSES=..."
        )
    weights = None if options.no_pretrained else "IMAGENET1K_V1"
    network = getattr(models, options.model)(weights=weights).to(options.device).eval()
    layer = nn.Linear(network.fc.in_features, len(train.class_names)).to(options.device)
    network.fc = nn.Identity()
    size, device = options.batch_size, options.device
    both = [features(network, train, size, device, mirrored=mirrored) for mirrored in (False, True)]
    fit(layer, torch.cat(both), torch.cat([train.labels, train.labels]), options)
    with torch.no_grad():
        logits = layer(features(network, test, size, device, mirrored=False).to(device)).cpu()
    print(f"test accuracy {(logits.argmax(dim=1) == test.labels).float().mean():.4f}")
    network.fc = layer
    options.out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, options.out / f"{options.model}.safetensors")


if __name__ == "__main__":
    main()
