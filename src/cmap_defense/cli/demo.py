"""``cmap-defense demo``: an attacked classifier recovers, on what ships with the package."""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmap_defense.attacks import PGD
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.build import Printed, backbone_and_purifier, threat_of
from cmap_defense.cli.output import NEAREST, image_sheet, listed, write_line_charts
from cmap_defense.cmap.voting import nearest_voter
from cmap_defense.common.modules import evaluating
from cmap_defense.common.progress import Progress
from cmap_defense.common.statistics import Accuracy
from cmap_defense.common.tables import table_lines
from cmap_defense.data.files import write_image
from cmap_defense.embedded import CLASS_NAMES, load_classifier, load_test_images
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers.names import name_of
from cmap_defense.results import History, PurificationResult
from cmap_defense.threat import ThreatModel

BACKBONE = "fashion-mnist-ct"
SHOWN = 6
ADAPTIVE_STEPS = 10
"""Of the attack on the defence."""
PREDICTIONS = 4
"""Of each image with independent noise, where the purifier is no optimisation: accuracy is their mean."""


def run_demo(options: dict[str, Any]) -> Printed:
    """Carry out the command."""
    start = time.perf_counter()
    count, steps, seed, out = (options[name] for name in ("images", "steps", "seed", "out"))
    threat = threat_of(options, zero=True)
    classifier = load_classifier()
    backbone, purifier = backbone_and_purifier(BACKBONE, options | {"device": "cpu"})
    defended = PurifiedClassifier(classifier, backbone, purifier=purifier).eval()
    images, labels = (part[:count] for part in load_test_images())
    with Progress(0, "demo") as progress:
        found = demonstrate(defended, images, labels, threat=threat, steps=steps, seed=seed, progress=progress)
    files = [write_image(_sheet(found, threat.eps), out / "sheet.png")]
    if found.histories and (chart := _write_moments(found.histories, out / "latents.png")) is not None:
        files.append(chart)
    if options["show"]:
        for path in files:
            webbrowser.open(path.resolve().as_uri())
    seconds, each = time.perf_counter() - start, found.seconds / (2 * count)
    rows = [[row, *map(str, columns.values())] for row, columns in found.accuracy.items()]
    values = {row: {name: a.value for name, a in columns.items()} for row, columns in found.accuracy.items()}
    intervals = {row: {name: a.interval for name, a in columns.items()} for row, columns in found.accuracy.items()}
    note, adaptive = "the attacks did not know the defence.", {}
    if "adaptive" in found.accuracy["purified"]:
        adaptive = {"adaptive attack": {"name": "PGD", "steps": ADAPTIVE_STEPS, "gradient": repr(Unrolled())}}
        note = (
            f"adaptive is PGD-{ADAPTIVE_STEPS} through the defence, to its exact gradient; more steps find more. "
            "The attack of the column before did not know the defence."
        )
    averaged = "" if found.predictions == 1 else f"; the mean of {found.predictions} predictions"
    values |= {
        **adaptive,
        "intervals": intervals,
        "note": note,
        "images": count,
        "attack": {"name": "PGD", "norm": "linf", "eps": threat.eps, "steps": steps},
        "purifier": name_of(purifier),
        "settings": purifier.to_dict(),
        "predictions": found.predictions,
        "backbone": BACKBONE,
        "seed": seed,
        "seconds": seconds,
        "purification_seconds_per_image": each,
        "files": [str(path) for path in files],
    }
    return values, [
        f"Fashion-MNIST, first {count} test images; PGD-{steps} at linf {threat.eps:g} on the undefended classifier.",
        f"Purified by {purifier!r}{averaged}. [95 % intervals]\n",
        *table_lines([["accuracy", *found.accuracy["undefended"]], *rows]),
        f"\n{textwrap.fill(f'Note: {note}', 100)}",
        f"{seconds:.0f} s in all, {each:.2g} s per purified image. Pictures: {listed(files)}",
    ]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """Images, the purification of those that were attacked without knowledge of it, accuracies ("undefended" and
    "purified") by the kind of images, each the mean of so many predictions behind the purifier, and for CMAP the
    histories of the clean images' latents with eq. 12 and without it."""

    clean: Tensor
    attacked: Tensor
    labels: Tensor
    purified: PurificationResult
    undefended_labels: Tensor
    accuracy: dict[str, dict[str, Accuracy]]
    histories: dict[str, History]
    seconds: float
    predictions: int


def over_margin(result: PurificationResult, labels: Tensor, count: int) -> Tensor:
    """[count] int64, images of a purification to show: evenly over the margin of the vote, the largest first.

    The margin is the lead of the true class over the best other one in shares of the votes, and among equal leads in
    mean probability: the share of shown images that the vote gets right differs from the accuracy by one image at most.
    """
    assert result.logits is not None
    assert result.votes is not None
    own = labels[:, None]

    def lead(values: Tensor) -> Tensor:
        others = values.scatter(1, own, -torch.inf).amax(dim=1)
        return values.gather(1, own)[:, 0] - others

    keys = (lead(result.logits.double().softmax(dim=-1).mean(dim=1)), lead(result.votes.double()))
    order = torch.arange(len(labels))
    for key in (*keys, result.labels == labels):  # the last one counts most
        order = order[key[order].double().argsort(descending=True, stable=True)]
    return order[((torch.arange(count) + 0.5) * len(order) / count).long()]


def demonstrate(
    defended: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    seed: int,
    progress: Progress,
) -> Demonstration:
    """Attack the undefended classifier with PGD, and the defence unless it is an optimisation; purify and classify all.

    Of CMAP the first images are purified without eq. 12 too (Fig. 6 of the paper).
    """
    classifier: Any = defended.classifier
    latent = defended.purifier.optimises_latents
    shown = min(SHOWN, len(images))
    seeds = torch.arange(len(images)) + 1_000_003 * seed
    total = 4 if not latent else 3 * (defended.settings.iterations + 1)
    progress.at(0, total, what="attacking the undefended classifier")
    attack = PGD(threat, steps=steps, seed=seed)
    sets = {"clean": images, "attacked": attack(classifier, images, labels).images}
    if not latent:
        progress.step("attacking the defence")
        through = dataclasses.replace(attack, steps=ADAPTIVE_STEPS, gradient=Unrolled())
        sets["adaptive"] = through(defended, images, labels).images
        progress.step()
    purified: dict[str, PurificationResult] = {}
    with torch.no_grad(), evaluating(classifier, defended), _steps_of(defended, progress):
        start = time.perf_counter()
        for name in ("clean", "attacked"):
            progress.step(f"purifying the {name} images")
            purified[name] = defended.purify(images if name == "clean" else sets[name], seeds=seeds)
            progress.step()
        seconds = time.perf_counter() - start
        undefended = {name: classifier(x).argmax(1) for name, x in sets.items()}
        votes = {name: [result] for name, result in purified.items()}
        if not latent:  # with noise that the attack has not seen
            progress.step("predicting again with other noise")
            for name, x in sets.items():
                while len(votes.setdefault(name, [])) < PREDICTIONS:
                    votes[name].append(defended.purify(x, seeds=seeds + 500_009 + 7_919 * len(votes[name])))
            progress.step()
        histories = {}
        if latent:
            progress.step("purifying without the latent constraint")
            kept = purified["clean"].history
            assert kept is not None
            histories["with constraint"] = History(*(part[:, :shown] for part in dataclasses.astuple(kept)))
            loose = defended.variant(settings=defended.settings.replace(latent_weight=0.0))
            with _steps_of(loose, progress):
                histories["without"] = loose.purify(images[:shown], seeds=seeds[:shown]).history
    accuracy = {
        "undefended": {name: Accuracy.of(given, labels) for name, given in undefended.items()},
        "purified": {name: _accuracy(results, labels) for name, results in votes.items()},
    }
    return Demonstration(
        images,
        sets["attacked"],
        labels,
        purified["attacked"],
        undefended["attacked"],
        accuracy,
        histories,
        seconds,
        len(votes["clean"]),
    )


def _accuracy(results: Sequence[PurificationResult], labels: Tensor) -> Accuracy:
    """The mean over several predictions."""
    predicted = torch.stack([result.labels for result in results if result.labels is not None])
    return Accuracy.mean((predicted == labels).double().mean(dim=0))


def _steps_of(model: PurifiedClassifier, progress: Progress) -> contextlib.AbstractContextManager[Any]:
    """Shows each iteration of CMAP; nothing for other purifiers."""
    if not model.purifier.optimises_latents:
        return contextlib.nullcontext()
    return model.register_step_hook(lambda state: progress.step())


def _sheet(found: Demonstration, eps: float) -> Image.Image:
    """Images evenly over the vote's margin: input, attacked, difference and purified, with the predictions."""
    result = found.purified
    assert result.labels is not None
    assert result.logits is not None
    rows = over_margin(result, found.labels, min(SHOWN, len(found.clean)))
    voter = nearest_voter(found.attacked, result.images, result.logits, result.labels)
    captions = [
        [
            f"true: {CLASS_NAMES[found.labels[row]]}",
            f"undefended: {CLASS_NAMES[found.undefended_labels[row]]}",
            "",
            f"vote: {CLASS_NAMES[result.labels[row]]}",
        ]
        for row in rows
    ]
    columns = {
        "input": found.clean[rows],
        "attacked": found.attacked[rows],
        "difference x 10": (0.5 + 10 * (found.attacked - found.clean)[rows]).clamp(0, 1),
        "purified": result.images[rows, voter[rows]],
    }
    attack = f"PGD at linf {eps:g} on the undefended classifier, which did not know the defence"
    return image_sheet(columns, captions, f"{attack}\n{NEAREST};\nimages spread evenly over the vote's margin")


def _write_moments(histories: dict[str, History], path: Path) -> Path | None:
    """Fig. 6 of the paper: moments of the latents over the iterations, with and without eq. 12."""
    charts = {}
    for heading, moment in (("Mean of the latents", "latent_mean"), ("Standard deviation", "latent_std")):
        courses = {name: getattr(history, moment).mean(1).tolist() for name, history in histories.items()}
        charts[heading] = {name: (range(len(course)), course) for name, course in courses.items()}
    normal = {"Mean of the latents": ("standard normal", 0.0), "Standard deviation": ("standard normal", 1.0)}
    return write_line_charts(path, charts, "iteration", targets=normal)
