"""Accuracy against coverage: what a calibrated threshold withholds on clean and on attacked images.

    python examples/abstain.py --count 256

The threshold is chosen on held-out training images of Fashion-MNIST, and measured on the embedded test images: clean,
under PGD on the undefended classifier, and under PGD through the exact gradient of the defence.
"""

import argparse

import torch
from measuring import last

from cmap_defense import PurifiedClassifier, ThreatModel
from cmap_defense.attacks import PGD
from cmap_defense.data import load_dataset
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import OneStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=256, help="number of images, for the threshold and to measure on")
    parser.add_argument("--level", type=float, default=0.8)
    parser.add_argument("--coverage", type=float, nargs="+", default=[1.0, 0.95, 0.9, 0.8])
    parser.add_argument("--score", choices=["confidence", "agreement"], default="confidence")
    parser.add_argument("--steps", type=int, default=20, help="of PGD")
    parser.add_argument("--eot", type=int, default=4, help="predictions that a gradient is averaged over")
    options = parser.parse_args()
    if not 1 <= options.count <= 256:
        parser.error("--count must be from 1 to 256, the number of embedded test images")

    images, labels = (part[: options.count] for part in load_test_images())
    clean = last(load_dataset("fashion-mnist", "train"), options.count)[0]
    purifier = OneStep(level=options.level, n_latents=8)
    model = PurifiedClassifier(load_classifier(), "fashion-mnist-edm", purifier=purifier, gradient=Unrolled()).eval()
    threat = ThreatModel(eps=0.05)
    shown = {
        "clean": images,
        "PGD on the undefended classifier": PGD(threat, steps=options.steps)(model.classifier, images, labels).images,
        "PGD through the defence": PGD(threat, steps=options.steps, eot=options.eot)(
            model.variant(purifier=purifier.replace(n_latents=2)), images, labels
        ).images,
    }
    seeds = torch.arange(options.count)
    print(f"| coverage on clean images ({options.score}) | " + " | ".join(shown) + " |")
    print("| --- |" + " --- |" * len(shown))
    for coverage in options.coverage:
        model.calibrate(clean, coverage=coverage, score=options.score, seeds=seeds)
        cells = []
        for x in shown.values():
            found = model.predict(x, seeds=seeds + 10**6)
            kept = ~found.abstained
            right = (found.labels == labels)[kept].float().mean()
            cells.append(f"{right:.3f} ({100 * kept.float().mean():.1f} % kept)")
        print(f"| {coverage:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
