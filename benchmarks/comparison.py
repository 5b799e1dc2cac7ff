"""The comparison of purifiers on the packaged models: choose levels on held-out images, then attack what was chosen.

    python benchmarks/comparison.py levels --data fashion-mnist --out runs/fashion
    python benchmarks/comparison.py frontier --data fashion-mnist --out runs/fashion
    python benchmarks/comparison.py exact --data fashion-mnist --out runs/fashion
    python benchmarks/comparison.py paper --data fashion-mnist --out runs/fashion
    python benchmarks/comparison.py differences --data fashion-mnist --count 128 --out runs/fashion
    python benchmarks/comparison.py speed --data fashion-mnist --count 4

``levels`` measures every candidate on held-out images: clean, under PGD on the undefended classifier, and under PGD
through the exact gradient of one-step purification at 0.3 and 0.5. The images are attacked once, for all candidates.
``frontier`` attacks the most promising ones on held-out images, each through its own exact gradient: the presets are
chosen there. ``exact`` runs the set of attacks "exact" on what was chosen, and ``paper`` PGD on the undefended
classifier on the constants of the papers, both on test images. ``differences`` compares what ``exact`` has attacked,
image by image: the mean difference of each two defences, with 95 % intervals that hold for each of them by itself.
``speed`` times a prediction behind each purifier of ``exact``, all in turns, as ratios to the first. Everything
takes K = 4 versions, and goes on where it was killed; what is attacked can be dealt out to processes, by ``torchrun
--nproc-per-node 2`` before the name of this file. A folder of ``levels`` is refused where the images in it were
attacked with other options. For CIFAR-10 give ``--weights cifar10_resnet56.safetensors``.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from cmap_defense import CMAP, CMAPSettings, PurifiedClassifier, ThreatModel
from cmap_defense.attacks import PGD, NoiseAndDenoise, Transfer, Undefended, exact_suite
from cmap_defense.common.files import refuse_other_settings, tensor_checksum
from cmap_defense.common.tables import markdown_table
from cmap_defense.data import load_dataset
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.errors import EvaluationError
from cmap_defense.evaluation import Protocol, compare, paired_differences, write_comparison
from cmap_defense.evaluation.differences import differences_table
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import (
    ADP,
    GDMP,
    GNSP,
    Chain,
    DiffPure,
    Identity,
    LikelihoodMaximisation,
    OneStep,
    Purifier,
)

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from cifar_resnet import load_cifar_resnet
from measuring import last

K = 4
EPS = {"fashion-mnist": 0.05, "cifar10": 8 / 255}
BACKBONES = {
    "fashion-mnist": ("fashion-mnist-ct", "fashion-mnist-edm"),
    "cifar10": ("cifar10-ct-small", "cifar10-edm-small"),
}
CONSISTENT = ("one-step-ct", "cmap")
"""What runs on the consistency model where it could run on the denoiser: names that begin so."""

GRID = {0.5: (3, 6), 0.8: (3, 6), 1.2: (3, 6, 12), 2.0: (6, 12), 4.0: (12,), 80.0: (20,)}
"""Levels and numbers of iterations of CMAP; without an iteration it is one-step purification."""


def near(level: float | None, iterations: int, **changes: float) -> CMAP:
    """CMAP with latents at a noise level."""
    return CMAP(CMAPSettings(n_latents=K, iterations=iterations, learning_rate=0.1, level=level, **changes))


def backbones_for(name: str, data: str) -> tuple[str, ...] | str:
    """The backbone of a purifier by its name here, or the pair of them."""
    return BACKBONES[data][0] if name.startswith(CONSISTENT) else BACKBONES[data]


def diffpure(t: int) -> DiffPure:
    """DiffPure with ten times longer steps than the paper's: t / 10 of them."""
    return DiffPure(t=t, step=0.01, n_latents=K)


def candidates(eps: float) -> dict[str, list[Purifier]]:
    """The settings to choose from by purifier, from the lowest level up."""
    return {
        "none": [Identity()],
        "one-step": [OneStep(level=level, n_latents=K) for level in (0.2, 0.3, 0.4, 0.6, 0.8, 1.2)],
        "one-step-ct": [OneStep(level=level, n_latents=K) for level in (0.3, 0.4, 0.6, 0.8, 1.2, 2.0)],
        "diffpure": [diffpure(t) for t in (40, 60, 80, 110, 150, 200)],
        "gdmp": [GDMP(t=t, rounds=2, eps=eps, n_latents=K) for t in (10, 20, 36)],
        "adp": [ADP(noise=noise, n_latents=K) for noise in (0.1, 0.17, 0.25)],
        "gnsp": [GNSP(rounds=rounds, n_latents=K) for rounds in ((8, 8, 16), (12, 12, 32), (20, 20, 50))],
        "likelihood": [LikelihoodMaximisation(learning_rate=rate, n_latents=K) for rate in (0.03, 0.06, 0.1)],
        "cmap-level": [near(level, n) for level, counts in GRID.items() for n in counts],
        "cmap": [near(None, 50)],
        "cmap-fits-less": [
            near(1.2, 6, tolerance=2 * eps),
            near(1.2, 6, latent_weight=12.8),
            near(1.2, 6, ssim_weight=8.0),
            Chain(OneStep(level=1.2, n_latents=K), near(1.2, 6), handed_on="mean"),
            near(1.2, 6, tolerance=2.0),  # SSIM alone: L1 is 0 up to the largest difference that there is
            Chain(near(2.0, 3), near(0.8, 3), handed_on="mean"),  # from a high level to a low one
        ],
        "diffpure, then cmap": [Chain(diffpure(t), near(0.5, 3)) for t in (40, 60, 80)],
    }


def setup(options: argparse.Namespace, held_out: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The classifier, images in [0, 1] and labels."""
    if options.data == "fashion-mnist":
        classifier = load_classifier()
        test = (part[: options.count] for part in load_test_images())
    else:
        classifier = load_cifar_resnet(options.weights, 56, unit=True)
        chosen = load_dataset("cifar10", "test")[: options.count]
        test = (chosen.unit, chosen.labels)
    images, labels = last(load_dataset(options.data, "train"), options.count) if held_out else test
    return classifier.eval(), images, labels


def attacked_images(stored: Path, made_with: dict[str, object]) -> dict[str, Tensor] | None:
    """The images that an earlier call attacked, or None. Refuses those that were attacked with other options."""
    if not stored.exists():
        return None
    kept = torch.load(stored)
    refuse_other_settings(
        kept["made_with"],
        made_with,
        EvaluationError,
        what=f"{stored.parent} holds images that were attacked with other options",
        remedy="Give the same options to go on with them, or another folder.",
    )
    return kept["images"]


def levels(options: argparse.Namespace) -> None:
    """A line of JSON for each candidate."""
    classifier, images, labels = setup(options, held_out=True)
    threat, results = ThreatModel(eps=EPS[options.data]), options.out / "levels.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    undefended = PurifiedClassifier(classifier, BACKBONES[options.data], purifier=Identity()).eval()
    stored = options.out / "attacked.pt"
    made_with = {"data": options.data, "count": options.count, "steps": options.steps}
    made_with["weights"] = tensor_checksum(undefended.state_dict().items())
    attacked = attacked_images(stored, made_with)
    lines = map(json.loads, results.open()) if results.exists() else ()
    done = {(line["purifier"], line["settings"]) for line in lines}
    if attacked is None:
        attacked = {"clean": images}
        attack = PGD(threat, steps=options.steps)
        attacked["undefended"] = Transfer(attack, source=Undefended())(undefended, images, labels).images
        for sigma in (0.3, 0.5):
            attack = PGD(threat, steps=options.steps, eot=8, momentum=0.75, schedule="cosine")
            found = Transfer(attack, source=NoiseAndDenoise(sigma=sigma))(undefended, images, labels)
            attacked[f"one-step at {sigma}"] = found.images
        torch.save({"made_with": made_with, "images": attacked}, stored)
    for kind, purifiers in candidates(EPS[options.data]).items():
        for purifier in purifiers:
            if (kind, repr(purifier)) in done or (options.only and kind not in options.only):
                continue
            backbone = backbones_for(kind, options.data)
            model = PurifiedClassifier(classifier, backbone, purifier=purifier).eval()
            row: dict[str, object] = {"purifier": kind, "settings": repr(purifier), "passes": purifier.passes}
            begun = time.perf_counter()
            for name, x in attacked.items():
                right = [
                    model.purify(x, seeds=torch.arange(len(x)) + 10_000_019 * run).labels == labels for run in range(2)
                ]
                row[name] = round(torch.stack(right).float().mean().item(), 4)
            row["seconds"] = round((time.perf_counter() - begun) / len(images) / 2 / len(attacked), 4)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


CHOSEN: dict[str, dict[str, Purifier]] = {
    "fashion-mnist": {
        "none": Identity(),
        "one-step": OneStep(level=0.8, n_latents=K),
        "one-step-ct": OneStep(level=0.6, n_latents=K),
        "diffpure": diffpure(80),
        "gdmp": GDMP(t=36, rounds=2, eps=EPS["fashion-mnist"], n_latents=K),
        "adp": ADP(noise=0.1, n_latents=K),
        "gnsp": GNSP(rounds=(20, 20, 50), n_latents=K),
        "likelihood": LikelihoodMaximisation(learning_rate=0.06, n_latents=K),
        "cmap-level": near(0.8, 3),
        "cmap-paper": near(None, 50),
        "diffpure, then cmap": Chain(diffpure(60), near(0.5, 3)),
    },
    "cifar10": {
        "none": Identity(),
        "one-step": OneStep(level=0.2, n_latents=K),
        "one-step-ct": OneStep(level=0.3, n_latents=K),
        "diffpure": diffpure(40),
        "gdmp": GDMP(t=10, rounds=2, eps=EPS["cifar10"], n_latents=K),
        "adp": ADP(noise=0.1, n_latents=K),
        "gnsp": GNSP(rounds=(8, 8, 16), n_latents=K),
        "likelihood": LikelihoodMaximisation(learning_rate=0.03, n_latents=K),
        "cmap-level": near(1.2, 12),
        "cmap-paper": near(None, 50),
        "diffpure, then cmap": Chain(diffpure(40), near(0.5, 3)),
    },
}
"""What ``levels`` chose of what it has measured: the highest sum of clean accuracy and the lowest attacked one."""


FRONTIER: dict[str, dict[str, Purifier]] = {
    "fashion-mnist": {
        "one-step-0.5": OneStep(level=0.5, n_latents=K),
        "one-step-0.8": OneStep(level=0.8, n_latents=K),
        "one-step-1.2": OneStep(level=1.2, n_latents=K),
        "one-step-ct-0.6": OneStep(level=0.6, n_latents=K),
        "one-step-ct-0.8": OneStep(level=0.8, n_latents=K),
        "one-step-ct-0.8-of-16": OneStep(level=0.8, n_latents=16),
        "diffpure-80": diffpure(80),
        "cmap-0.8-3": near(0.8, 3),
        "cmap-1.2-3": near(1.2, 3),
        "cmap-1.2-6-prior": near(1.2, 6, latent_weight=12.8),
        "cmap-2-6": near(2.0, 6),
        "likelihood-0.06": LikelihoodMaximisation(learning_rate=0.06, n_latents=K),
        "likelihood-0.1": LikelihoodMaximisation(n_latents=K),
        "none": Identity(),
    },
    "cifar10": {
        "one-step-0.2": OneStep(level=0.2, n_latents=K),
        "one-step-ct-0.3": OneStep(level=0.3, n_latents=K),
        "one-step-ct-0.4": OneStep(level=0.4, n_latents=K),
        "one-step-ct-0.6": OneStep(level=0.6, n_latents=K),
        "diffpure-40": diffpure(40),
        "cmap-0.8-3": near(0.8, 3),
    },
}
"""The settings with the best of clean accuracy and accuracy under the attacks of ``levels``, and neighbours of them."""


def paper(eps: float) -> dict[str, Purifier]:
    """The constants of the papers for CIFAR-10 in linf, with K = 4."""
    presets = (OneStep(level=0.5), DiffPure(t=100), GDMP(eps=eps), ADP(), GNSP(), LikelihoodMaximisation())
    found: dict[str, Purifier] = {type(preset).__name__: preset.replace(n_latents=K) for preset in presets}
    return found | {"CMAP": CMAP(CMAPSettings(n_latents=K, iterations=200))}


def attacked(options: argparse.Namespace) -> None:
    """The comparison under attack, as ``cmap-defense compare`` makes it."""
    classifier, images, labels = setup(options, held_out=options.stage == "frontier")
    threat = ThreatModel(eps=EPS[options.data])
    attacks = {
        name: dataclasses.replace(attack, restarts=options.restarts) if isinstance(attack, PGD) else attack
        for name, attack in exact_suite(threat, steps=options.steps, eot=options.eot).items()
    }
    if options.stage == "paper":
        purifiers, attacks = paper(threat.eps), {"transfer": attacks["transfer"]}
    elif options.stage == "frontier":
        purifiers = FRONTIER[options.data]
        attacks = {"exact-eot": dataclasses.replace(attacks["exact-eot"], gradient=Unrolled(l1_smoothing=0.3))}
    else:
        purifiers = CHOSEN[options.data]
        attacks = {name: attack for name, attack in attacks.items() if not options.attacks or name in options.attacks}
    comparison = compare(
        {
            name: PurifiedClassifier(classifier, backbones_for(name, options.data), purifier=purifier).eval()
            for name, purifier in purifiers.items()
            if not options.only or name in options.only
        },
        (images, labels),
        options.out / f"{options.stage}-{options.count}",
        attacks=attacks,
        protocol=Protocol(predictions=2, reevaluations=4),
        threads=1,
        progress=True,
    )
    if os.environ.get("RANK", "0") == "0":  # torchrun's; the others are done
        print(write_comparison(comparison, options.out / f"{options.stage}-{options.count}")[0][1].read_text())


def differences(options: argparse.Namespace) -> None:
    """The differences of each two defences in the folder of ``exact``, image by image."""
    found = sorted((options.out / f"exact-{options.count}").glob("*/results.jsonl"))
    folders = {path.parent.name: path.parent for path in found}
    chosen = {name: folder for name, folder in folders.items() if not options.only or name in options.only}
    print(markdown_table(differences_table(paired_differences(chosen))))


def speed(options: argparse.Namespace) -> None:
    """Seconds of a prediction of an image, the median of five, and the ratio to the first purifier's."""
    classifier, images, _ = setup(options, held_out=True)
    models = {
        name: PurifiedClassifier(classifier, backbones_for(name, options.data), purifier=purifier).eval()
        for name, purifier in CHOSEN[options.data].items()
        if (name in options.only if options.only else purifier.passes)
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(1 + 5):
            for name, model in models.items():
                begun = time.perf_counter()
                model(images)
                seconds[name].append((time.perf_counter() - begun) / len(images))
    found = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}  # the first prediction warms up
    first = next(iter(found.values()))
    print("| purifier | passes | seconds an image | ratio |\n| --- | --- | --- | --- |")
    for name, median in found.items():
        print(f"| {name} | {models[name].purifier.passes} | {median:.4f} | {median / first:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["levels", "frontier", "exact", "paper", "differences", "speed"])
    parser.add_argument("--data", choices=list(EPS), required=True)
    parser.add_argument("--weights", type=Path, help="safetensors of a CIFAR ResNet-56")
    parser.add_argument("--count", type=int, default=64, help="number of images")
    parser.add_argument("--steps", type=int, default=20, help="of the attacks")
    parser.add_argument(
        "--eot", type=int, default=2, help="predictions of K purifications that a gradient is averaged over"
    )
    parser.add_argument("--restarts", type=int, default=1, help="of PGD where it attacks the defence")
    parser.add_argument("--only", nargs="*", help="names of purifiers; all without")
    parser.add_argument("--attacks", nargs="*", help="names of attacks, for the stage exact; all without")
    parser.add_argument("--out", type=Path, help="folder of the results; not for speed")
    options = parser.parse_args()
    known = {
        "levels": candidates(EPS[options.data]),
        "frontier": FRONTIER[options.data],
        "paper": paper(EPS[options.data]),
    }
    unknown = set(options.only or ()) - known.get(options.stage, CHOSEN[options.data]).keys()
    if unknown:
        parser.error(f"--only: {options.stage} has no {', '.join(sorted(unknown))}")
    if options.out is None and options.stage != "speed":
        parser.error("give --out, the folder of the results")
    {"levels": levels, "differences": differences, "speed": speed}.get(options.stage, attacked)(options)


if __name__ == "__main__":
    main()
