"""Compare purifiers on the packaged Fashion-MNIST models: the same images, the same attacks, one table and one plot.

    python examples/compare_purifiers.py --count 64 --out runs/comparison

Each purifier takes K = 4 purified versions of an image, since a vote gets more robust as it grows. The exact attacks
differentiate every step of a purification, so that the run takes as long as the slowest purifier's; one of them needs
the extra [attacks]. Killed at any moment, the same command continues.
"""

import argparse
from pathlib import Path

from cmap_defense import CMAP, CMAPSettings, PurifiedClassifier, ThreatModel, load_backbone
from cmap_defense.attacks import exact_suite
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.evaluation import Protocol, compare, write_comparison
from cmap_defense.purifiers import Chain, DiffPure, Identity, OneStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="number of test images")
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=10, help="of the attacks")
    parser.add_argument("--eot", type=int, default=4, help="evaluations per gradient")
    parser.add_argument("--only", nargs="*", help="names of the purifiers; all without")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    options = parser.parse_args()
    if options.count < 1:
        parser.error("--count must be at least 1")

    images, labels = (tensor[: options.count] for tensor in load_test_images())
    classifier = load_classifier()
    backbones = load_backbone("fashion-mnist-ct"), load_backbone("fashion-mnist-edm")
    near = CMAP(CMAPSettings(n_latents=4, iterations=5, learning_rate=0.1, level=1.0))
    purifiers = {
        "none": Identity(),
        "one-step": OneStep(level=0.4, n_latents=4),
        "diffpure": DiffPure(t=40, n_latents=4),
        "cmap-level-1": near,
        "diffpure-then-cmap": Chain(DiffPure(t=20, n_latents=4), near),
    }
    unknown = set(options.only or ()) - purifiers.keys()
    if unknown:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}, but there are {', '.join(purifiers)}")
    models = {
        name: PurifiedClassifier(classifier, backbones, purifier=purifier).eval()
        for name, purifier in purifiers.items()
        if not options.only or name in options.only
    }
    comparison = compare(
        models,
        (images, labels),
        options.out,
        attacks=exact_suite(ThreatModel(eps=options.eps), steps=options.steps, eot=options.eot),
        protocol=Protocol(predictions=3, reevaluations=5),
        progress=True,
    )
    files, lacking = write_comparison(comparison, options.out)
    print(files[1].read_text())
    print(", ".join(map(str, files)) if lacking is None else lacking)


if __name__ == "__main__":
    main()
