"""Measure the embedded model: classifier and PGD-20, bare and behind the wrapper, one line of JSON per settings.

    python examples/measure_fashion.py --on test                  the card's figures, on the 256 embedded images
    python examples/measure_fashion.py --on held-out --count 64 --latents 4 --iterations 25 50 --learning-rate 0.05 0.1

"held-out" are the last images of Fashion-MNIST's training set, which neither the backbone nor the classifier has seen:
what ships was tuned on them and measured once on the test images. The attacker does not know the defence.
"""

import argparse
import itertools
import json
import time

import torch

from cmap_defense import PurifiedClassifier, load_backbone
from cmap_defense.attacks import PGD, ThreatModel
from cmap_defense.data import load_dataset
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.evaluation import Accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=["test", "held-out"], required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--backbone", default="fashion-mnist-ct")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latents", type=int, nargs="+")
    parser.add_argument("--iterations", type=int, nargs="+")
    parser.add_argument("--learning-rate", type=float, nargs="+")
    parser.add_argument("--ssim-weight", type=float, nargs="+")
    parser.add_argument("--latent-weight", type=float, nargs="+")
    options = parser.parse_args()

    if options.on == "test":
        images, labels = (t[: options.count] for t in load_test_images())
    else:
        held_out = load_dataset("fashion-mnist", "train")[-options.count :]
        images, labels = held_out.unit, held_out.labels
    classifier = load_classifier()
    backbone = load_backbone(options.backbone, dtype=getattr(torch, options.dtype))
    attacked = PGD(ThreatModel(eps=options.eps), steps=20, seed=options.seed)(classifier, images, labels).images
    with torch.no_grad():
        bare = {
            name: Accuracy.of(classifier(x).argmax(1), labels)
            for name, x in (("clean", images), ("attacked", attacked))
        }
    print(
        json.dumps({"bare": {n: str(a) for n, a in bare.items()}, "images": len(images), "eps": options.eps}),
        flush=True,
    )

    shipped = PurifiedClassifier(classifier, backbone).settings
    names = ("n_latents", "iterations", "learning_rate", "ssim_weight", "latent_weight")
    given = (options.latents, options.iterations, options.learning_rate, options.ssim_weight, options.latent_weight)
    for values in itertools.product(*(g or [getattr(shipped, n)] for n, g in zip(names, given, strict=True))):
        settings = shipped.replace(**dict(zip(names, values, strict=True)))
        defended = PurifiedClassifier(classifier, backbone, settings=settings)
        row: dict[str, object] = dict(zip(names, values, strict=True))
        for name, x in (("clean", images), ("attacked", attacked)):
            start = time.perf_counter()
            with torch.no_grad():
                result = defended.purify(x, seeds=torch.arange(len(x)) + 1_000_003 * options.seed)
            row[name] = str(Accuracy.of(result.labels, labels))
            row[f"{name} one latent"] = round((result.logits.argmax(-1) == labels[:, None]).float().mean().item(), 4)
            row[f"{name} seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
