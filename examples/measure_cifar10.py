"""Measure a CIFAR-10 backbone behind a CIFAR ResNet under PGD-20, one line of JSON per settings.

    python examples/measure_cifar10.py --on held-out --classifier cifar10_resnet56.safetensors --depth 56 \\
        --latents 4 --iterations 50 100 --learning-rate 0.05 0.1

"held-out" are the last images of CIFAR-10's training set, which cifar10-ct-small has not seen (most classifiers have):
its settings were chosen on them. The attacker does not know the defence.
"""

import argparse
from pathlib import Path

from cifar_resnet import load_cifar_resnet
from measuring import add_options, last, measure

from cmap_defense.data import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, backbone="cifar10-ct-small", eps=8 / 255, count=64)
    parser.add_argument("--classifier", type=Path, required=True, help="safetensors of a CIFAR ResNet")
    parser.add_argument("--depth", type=int, default=56)
    options = parser.parse_args()
    if options.on == "test":
        chosen = load_dataset("cifar10", "test")[: options.count]
        images, labels = chosen.unit, chosen.labels
    else:
        images, labels = last(load_dataset("cifar10", "train"), options.count)
    measure(load_cifar_resnet(options.classifier, options.depth, unit=True), images, labels, options)


if __name__ == "__main__":
    main()
