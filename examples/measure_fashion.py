"""Measure the embedded model: classifier and PGD-20, undefended and behind the wrapper, one line of JSON per settings.

    python examples/measure_fashion.py --on test                  the card's figures, on the 256 embedded images
    python examples/measure_fashion.py --on held-out --count 64 --latents 4 --iterations 25 50 --learning-rate 0.05 0.1

"held-out" are the last images of Fashion-MNIST's training set, which neither the backbone nor the classifier has seen:
what ships was tuned on them and measured once on the test images. The attacker does not know the defence.
"""

import argparse

from measuring import add_options, last, measure

from cmap_defense.data import load_dataset
from cmap_defense.embedded import load_classifier, load_test_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, backbone="fashion-mnist-ct", eps=0.05, count=256)
    options = parser.parse_args()
    if options.on == "test":
        images, labels = (t[: options.count] for t in load_test_images())
    else:
        images, labels = last(load_dataset("fashion-mnist", "train"), options.count)
    measure(load_classifier(), images, labels, options)


if __name__ == "__main__":
    main()
