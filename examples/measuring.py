"""PGD-20 on the undefended classifier and behind the defence, for measure_fashion.py and measure_cifar10.py."""

import argparse
import itertools
import json
import time

import torch
from torch import Tensor, nn

from cmap_defense import PurifiedClassifier, load_backbone
from cmap_defense.attacks import PGD, ThreatModel
from cmap_defense.data import LabelledImages
from cmap_defense.evaluation import Accuracy
from cmap_defense.purifiers import OneStep

SETTINGS = ("n_latents", "iterations", "learning_rate", "ssim_weight", "latent_weight")


def add_options(parser: argparse.ArgumentParser, *, backbone: str, eps: float, count: int) -> None:
    """What to measure on; with several values of a setting, all combinations are measured."""
    parser.add_argument("--on", choices=["test", "held-out"], required=True)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--backbone", default=backbone)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eps", type=float, default=eps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latents", type=int, nargs="+")
    parser.add_argument("--iterations", type=int, nargs="+")
    parser.add_argument("--one-step", type=float, nargs="+", metavar="LEVEL", help="one-step purification instead")
    for name in ("--learning-rate", "--ssim-weight", "--latent-weight"):
        parser.add_argument(name, type=float, nargs="+")


def last(data: LabelledImages, count: int) -> tuple[Tensor, Tensor]:
    """The last images in [0, 1], and their labels."""
    chosen = data[len(data) - count :]
    return chosen.unit, chosen.labels


def measure(classifier: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Print the undefended classifier's accuracies, then those behind the defence for each combination of settings.

    classifier: of images [B, C, H, W] in [0, 1].
    """
    backbone = load_backbone(options.backbone, dtype=getattr(torch, options.dtype))
    attacked = PGD(ThreatModel(eps=options.eps), steps=20, seed=options.seed)(classifier, images, labels).images
    with torch.no_grad():
        undefended = {
            name: Accuracy.of(classifier(x).argmax(1), labels)
            for name, x in (("clean", images), ("attacked", attacked))
        }
    print(
        json.dumps(
            {"undefended": {n: str(a) for n, a in undefended.items()}, "images": len(images), "eps": options.eps}
        ),
        flush=True,
    )
    both = {"clean": images, "attacked": attacked}
    if options.one_step:
        for level, latents in itertools.product(options.one_step, options.latents or [8]):
            defended = PurifiedClassifier(classifier, backbone, purifier=OneStep(level=level, n_latents=latents))
            print(
                json.dumps({"level": level, "n_latents": latents, **measured(defended, both, labels, options)}),
                flush=True,
            )
        return
    shipped = PurifiedClassifier(classifier, backbone, preset="paper").settings
    given = (options.latents, options.iterations, options.learning_rate, options.ssim_weight, options.latent_weight)
    for values in itertools.product(*(g or [getattr(shipped, n)] for n, g in zip(SETTINGS, given, strict=True))):
        row: dict[str, object] = dict(zip(SETTINGS, values, strict=True))
        defended = PurifiedClassifier(classifier, backbone, settings=shipped.replace(**row))
        print(json.dumps(row | measured(defended, both, labels, options)), flush=True)


def measured(
    defended: PurifiedClassifier, images: dict[str, Tensor], labels: Tensor, options: argparse.Namespace
) -> dict[str, object]:
    """Accuracy of the vote and of one latent, and the time that it took, by the name of the images."""
    row: dict[str, object] = {}
    for name, x in images.items():
        start = time.perf_counter()
        with torch.no_grad():
            result = defended.purify(x, seeds=torch.arange(len(x)) + 1_000_003 * options.seed)
        row[name] = str(Accuracy.of(result.labels, labels))
        row[f"{name} one latent"] = round((result.logits.argmax(-1) == labels[:, None]).float().mean().item(), 4)
        row[f"{name} seconds"] = round(time.perf_counter() - start, 1)
    return row
