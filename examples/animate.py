"""Attack four test images, purify them, and write the course of the purification as a GIF.

    python examples/animate.py --out purification.gif

A row for each image: first the attacked image, then its K purified versions, from noise to the result.
"""

import argparse
from pathlib import Path

import torch

from cmap_defense import PurifiedClassifier, ThreatModel
from cmap_defense.attacks import PGD
from cmap_defense.classifier import Trajectory
from cmap_defense.embedded import CLASS_NAMES, load_classifier, load_test_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[0, 1, 2, 12], help="positions in the test images")
    parser.add_argument("--every", type=int, default=2, help="iterations from one frame to the next")
    parser.add_argument("--backbone", default="fashion-mnist-ct")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    images, labels = (part[options.images] for part in load_test_images())
    model = PurifiedClassifier(load_classifier(), options.backbone, preset="paper").eval()
    attacked = PGD(ThreatModel(eps=0.05), steps=20)(model.classifier, images, labels).images
    trajectory = Trajectory(every=options.every)
    with torch.no_grad():
        result = model.purify(attacked, seeds=options.images, callback=trajectory)
        undefended = model.undefended(attacked).argmax(dim=1)
    for true, before, after in zip(labels, undefended, result.labels, strict=True):
        print(f"{CLASS_NAMES[true]}: attacked {CLASS_NAMES[before]}, purified {CLASS_NAMES[after]}")
    print(trajectory.animate(options.out, scale=2, milliseconds=120))


if __name__ == "__main__":
    main()
