"""``cmap-defense demo``: an attacked classifier recovers, on what ships with the package."""

from __future__ import annotations

import dataclasses
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cmap_defense.attacks import PGD
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.build import Printed, purifier_of, threat_of
from cmap_defense.cli.output import NEAREST, image_sheet, listed, table_lines, write_line_charts
from cmap_defense.cmap.voting import nearest_voter
from cmap_defense.common.modules import evaluating
from cmap_defense.common.progress import Progress
from cmap_defense.common.statistics import Accuracy
from cmap_defense.data.files import write_image
from cmap_defense.embedded import CLASS_NAMES, load_classifier, load_test_images
from cmap_defense.evaluation.evaluation import using_threads
from cmap_defense.results import History, PurificationResult
from cmap_defense.threat import ThreatModel

BACKBONE = "fashion-mnist-ct"
NOTE = "the attacker did not know the defence"
SHOWN = 6


def run_demo(options: dict[str, Any]) -> Printed:
    """Carry out the command."""
    start = time.perf_counter()
    count, steps, seed, out = (options[name] for name in ("images", "steps", "seed", "out"))
    eps = threat_of(options, zero=True).eps
    classifier = load_classifier()
    defended = PurifiedClassifier(classifier, BACKBONE)
    purifier = purifier_of(options, defended.settings.to_dict())
    defended = PurifiedClassifier(classifier, defended.backbone, purifier=purifier)
    settings = defended.settings
    images, labels = load_test_images()
    with using_threads(options["threads"]), Progress(3 * settings.iterations, "demo") as progress:
        found = demonstrate(
            classifier,
            defended,
            images[:count],
            labels[:count],
            eps=eps,
            steps=steps,
            seed=seed,
            shown=min(SHOWN, count),
            on_step=progress.step,
        )
    files = [write_image(_sheet(found, eps), out / "sheet.png")]
    if (chart := _write_moments(found, out / "latents.png")) is not None:
        files.append(chart)
    if options["show"]:
        for path in files:
            webbrowser.open(path.resolve().as_uri())
    seconds, each = time.perf_counter() - start, found.seconds / (2 * count)
    rows = [[row, *map(str, columns.values())] for row, columns in found.accuracy.items()]
    values = {row: {name: a.value for name, a in columns.items()} for row, columns in found.accuracy.items()}
    intervals = {row: {name: a.interval for name, a in columns.items()} for row, columns in found.accuracy.items()}
    values |= {
        "intervals": intervals,
        "note": NOTE,
        "images": count,
        "attack": {"name": "PGD", "norm": "linf", "eps": eps, "steps": steps},
        "settings": settings.to_dict(),
        "backbone": BACKBONE,
        "seed": seed,
        "seconds": seconds,
        "purification_seconds_per_image": each,
        "files": [str(path) for path in files],
    }
    return values, [
        f"Fashion-MNIST, first {count} test images; PGD-{steps} at linf {eps:g} on the bare classifier.",
        f"CMAP with K = {settings.n_latents} latents, N = {settings.iterations} iterations. [95 % intervals]\n",
        *table_lines([["accuracy", "clean", "attacked"], *rows]),
        f"\nNote: {NOTE}. This shows how it works, not how robust it is.",
        f"{seconds:.0f} s in all, {each:.2f} s per purified image. Pictures: {listed(files)}",
    ]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """Images, the purification of the attacked ones, accuracies ("bare" and "purified") on "clean" and "attacked"
    images, and the histories of the clean ones' latents with eq. 12 and without it."""

    clean: Tensor
    attacked: Tensor
    labels: Tensor
    purified: PurificationResult
    bare_labels: Tensor
    accuracy: dict[str, dict[str, Accuracy]]
    constrained: History
    unconstrained: History
    seconds: float


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
    classifier: nn.Module,
    defended: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    seed: int,
    shown: int,
    on_step: Callable[[str], None] | None = None,
) -> Demonstration:
    """Attack ``classifier`` with PGD, purify clean and attacked images, classify all four.

    The attacker does not know the defence. ``on_step`` is called with the name of each part as it begins, and with ""
    at each latent iteration; the first ``shown`` images are purified without eq. 12 too (Fig. 6 of the paper).
    """
    say = on_step or (lambda name: None)
    say("attacking the bare classifier")
    attacked = PGD(ThreatModel(norm="linf", eps=eps), steps=steps, seed=seed)(classifier, images, labels).images
    seeds = torch.arange(len(images)) + 1_000_003 * seed
    with torch.no_grad(), evaluating(classifier, defended), defended.register_latent_hook(lambda state: say("")):
        bare = {"clean": classifier(images).argmax(1), "attacked": classifier(attacked).argmax(1)}
        start = time.perf_counter()
        say("purifying the clean images")
        purified_clean = defended.purify(images, seeds=seeds)
        say("purifying the attacked images")
        purified_attacked = defended.purify(attacked, seeds=seeds)
        seconds = time.perf_counter() - start
        say("purifying without the latent constraint")
        loose = PurifiedClassifier(classifier, defended.backbone, settings=defended.settings.replace(latent_weight=0.0))
        with loose.register_latent_hook(lambda state: say("")):
            unconstrained = loose.purify(images[:shown], seeds=seeds[:shown]).history
    assert purified_clean.history is not None
    assert unconstrained is not None
    assert purified_attacked.labels is not None
    assert purified_clean.labels is not None
    predicted = {
        "bare": bare,
        "purified": {"clean": purified_clean.labels, "attacked": purified_attacked.labels},
    }
    parts = (getattr(purified_clean.history, field.name)[:, :shown] for field in dataclasses.fields(History))
    return Demonstration(
        clean=images,
        attacked=attacked,
        labels=labels,
        purified=purified_attacked,
        bare_labels=bare["attacked"],
        accuracy={
            row: {name: Accuracy.of(given, labels) for name, given in columns.items()}
            for row, columns in predicted.items()
        },
        constrained=History(*parts),
        unconstrained=unconstrained,
        seconds=seconds,
    )


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
            f"bare: {CLASS_NAMES[found.bare_labels[row]]}",
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
    attack = f"PGD at linf {eps:g} on the bare classifier; {NOTE}"
    return image_sheet(columns, captions, f"{attack}\n{NEAREST};\nimages spread evenly over the vote's margin")


def _write_moments(found: Demonstration, path: Path) -> Path | None:
    """Fig. 6 of the paper: moments of the latents over the iterations, with and without eq. 12."""
    histories = {"with constraint": found.constrained, "without": found.unconstrained}
    charts = {}
    for heading, moment in (("Mean of the latents", "latent_mean"), ("Standard deviation", "latent_std")):
        courses = {name: getattr(history, moment).mean(1).tolist() for name, history in histories.items()}
        charts[heading] = {name: (range(len(course)), course) for name, course in courses.items()}
    normal = {"Mean of the latents": ("standard normal", 0.0), "Standard deviation": ("standard normal", 1.0)}
    return write_line_charts(path, charts, "iteration", targets=normal)
