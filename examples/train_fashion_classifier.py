"""Train the embedded Fashion-MNIST classifier and write the embedded assets.

    python examples/train_fashion_classifier.py --out OUT

It sees the first 55,000 training images, like the embedded backbone; the last 5,000 are held out for tuning. An
ordinary training without any defence: AdamW, one cycle, random flips and shifts. Some five minutes on two cores.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from cmap_defense.data import load_dataset
from cmap_defense.embedded import FashionCNN

HELD_OUT = 5000


def augment(images: Tensor) -> Tensor:
    """Random mirror and a random shift of up to two pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    dy, dx = torch.randint(0, 5, (2,)).tolist()
    return F.pad(mirrored, (2, 2, 2, 2))[:, :, dy : dy + 28, dx : dx + 28]


@torch.no_grad()
def accuracy(classifier: FashionCNN, images: Tensor, labels: Tensor) -> float:
    """Share of images that get their label."""
    classifier.eval()
    right = sum(
        (classifier(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = load_dataset("fashion-mnist", "train"), load_dataset("fashion-mnist", "test")
    train, held_out = train[:-HELD_OUT], train[-HELD_OUT:]
    classifier = FashionCNN()
    steps = options.epochs * (len(train) // options.batch_size)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    images = train.unit
    for epoch in range(options.epochs):
        classifier.train()
        for index in torch.randperm(len(train)).split(options.batch_size):
            if len(index) < options.batch_size:
                continue
            with torch.autocast("cpu", torch.bfloat16):
                logits = classifier(augment(images[index]))
            loss = F.cross_entropy(logits.float(), train.labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}: held-out accuracy {accuracy(classifier, held_out.unit, held_out.labels):.4f}",
            flush=True,
        )
    print(f"test accuracy {accuracy(classifier, test.unit, test.labels):.4f}")

    options.out.mkdir(parents=True, exist_ok=True)
    halved = {name: t.half() if t.is_floating_point() else t for name, t in classifier.state_dict().items()}
    (options.out / "classifier.safetensors").write_bytes(save(halved))
    np.savez_compressed(
        options.out / "test256.npz",
        images=test.images[:256, 0].numpy(),
        labels=test.labels[:256].numpy().astype(np.uint8),
    )


if __name__ == "__main__":
    main()
