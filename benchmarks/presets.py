"""Accuracy and time of the packaged models' presets, beside the setting that another commit shipped.

    python benchmarks/presets.py --data fashion-mnist --count 256
    python benchmarks/presets.py --data cifar10 --count 512 --weights cifar10_resnet56.safetensors

The test images are taken clean and under PGD-20 on the undefended classifier, which does not know the defence. They
come in parts: on each, the defence of the other commit (in a temporary git worktree) and every preset of this checkout
take turns, each in a process of its own. Only the calls are timed, after one on two images. A ratio of times is the
median over the parts; the times themselves depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

EPS = {"fashion-mnist": 0.05, "cifar10": 8 / 255}
BACKBONES = {
    "fashion-mnist": ("fashion-mnist-ct", "fashion-mnist-edm"),
    "cifar10": ("cifar10-ct-small", "cifar10-edm-small"),
}

CHILD = """
import json, sys, time
import torch
from cmap_defense import PurifiedClassifier
file, examples, backbone, weights, preset = sys.argv[1:]
if weights:
    sys.path.append(examples)
    from cifar_resnet import load_cifar_resnet
    classifier = load_cifar_resnet(weights, 56, unit=True)
else:
    from cmap_defense.embedded import load_classifier
    classifier = load_classifier()
model = PurifiedClassifier(classifier.eval(), backbone, **({"preset": preset} if preset else {})).eval()
images, found = torch.load(file), {}
with torch.no_grad():
    model(images["clean"][:2])
    for name, x in images.items():
        begun = time.perf_counter()
        found[name] = model(x, seeds=torch.arange(len(x))).argmax(1).tolist()
        found[name + " seconds"] = time.perf_counter() - begun
print(json.dumps(found))
"""


def main() -> None:
    from cifar_resnet import load_cifar_resnet

    from cmap_defense import ThreatModel, load_backbone
    from cmap_defense.attacks import PGD
    from cmap_defense.data import load_dataset
    from cmap_defense.embedded import load_classifier, load_test_images
    from cmap_defense.evaluation import Accuracy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(EPS), required=True)
    parser.add_argument("--weights", default="", help="safetensors of a CIFAR ResNet-56")
    parser.add_argument("--count", type=int, default=256, help="number of test images")
    parser.add_argument("--part", type=int, default=64, help="images in a part")
    parser.add_argument("--against", default="688c910", help="commit to compare with; its shipped setting is the first")
    options = parser.parse_args()
    if options.data == "cifar10":
        chosen = load_dataset("cifar10", "test")[: options.count]
        classifier, images, labels = load_cifar_resnet(options.weights, 56, unit=True), chosen.unit, chosen.labels
    else:
        classifier, (images, labels) = load_classifier(), (given[: options.count] for given in load_test_images())
    threat, backbones = ThreatModel(eps=EPS[options.data]), BACKBONES[options.data]
    both = {"clean": images, "attacked": PGD(threat, steps=20)(classifier.eval(), images, labels).images}
    named = [(name, preset) for name in backbones for preset in sorted(load_backbone(name).record.presets)]
    found: dict[str, list[dict[str, list[int] | float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        other, file = Path(folder) / "other", Path(folder) / "images.pt"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(other), options.against], cwd=ROOT, check=True)
        entries = [(options.against, other, backbones[0], "")]
        entries += [(f"{name}, {preset}", ROOT, name, preset) for name, preset in [(backbones[0], "paper"), *named]]
        try:
            for begin in range(0, len(images), options.part):
                torch.save({name: x[begin : begin + options.part] for name, x in both.items()}, file)
                for name, tree, backbone, preset in entries:
                    given = [str(file), str(tree / "examples"), backbone, options.weights, preset]
                    printed = subprocess.run(
                        [sys.executable, "-W", "ignore", "-c", CHILD, *given],
                        env=os.environ | {"PYTHONPATH": str(tree / "src")},
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    ).stdout
                    found.setdefault(name, []).append(json.loads(printed))
                print(f"{min(begin + options.part, len(images))} of {len(images)} images", file=sys.stderr, flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)

    def seconds(parts: list[dict[str, list[int] | float]]) -> list[float]:
        return [part["clean seconds"] + part["attacked seconds"] for part in parts]

    print("| setting | clean | attacked | seconds an image | times faster |\n| --- | --- | --- | --- | --- |")
    for name, parts in found.items():
        accuracies = [
            str(Accuracy.of(torch.tensor([label for part in parts for label in part[kind]]), labels)) for kind in both
        ]
        ratio = statistics.median(
            old / new for old, new in zip(seconds(found[options.against]), seconds(parts), strict=True)
        )
        each = sum(seconds(parts)) / 2 / len(images)
        print(f"| {name} | {accuracies[0]} | {accuracies[1]} | {each:.3f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
