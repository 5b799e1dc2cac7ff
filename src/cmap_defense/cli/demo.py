"""``cmap-defense demo``: an attacked classifier recovers, on what ships with the package."""

from __future__ import annotations

import time
from pathlib import Path

import click
from PIL import Image

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.figures import BLUE, NEAREST, ORANGE, Curve, chart_row, image_sheet
from cmap_defense.cli.output import print_json, print_table, using_threads
from cmap_defense.cli.progress import Progress
from cmap_defense.cmap.voting import nearest_voter
from cmap_defense.data.files import write_image
from cmap_defense.embedded import CLASS_NAMES, load_classifier, load_test_images
from cmap_defense.evaluation.demo import Demonstration, demonstrate, over_margin

__all__ = ["run_demo"]

NOTE = "the attacker did not know the defence"
SHOWN = 6


def run_demo(
    *,
    images: int,
    eps: float,
    steps: int,
    latents: int | None,
    iterations: int | None,
    seed: int,
    threads: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Carry out the command; the arguments are its options."""
    start = time.perf_counter()
    classifier = load_classifier()
    defended = PurifiedClassifier(classifier, backbone="fashion-mnist-ct")
    changes = {"n_latents": latents, "iterations": iterations}
    settings = defended.settings.replace(**{name: value for name, value in changes.items() if value is not None})
    defended = PurifiedClassifier(classifier, defended.backbone, settings=settings)
    test_images, labels = load_test_images()
    with using_threads(threads), Progress(3 * settings.iterations, "demo") as progress:
        shown = demonstrate(
            classifier,
            defended,
            test_images[:images],
            labels[:images],
            eps=eps,
            steps=steps,
            seed=seed,
            shown=min(SHOWN, images),
            on_step=progress.step,
        )
    files = [write_image(_sheet(shown, eps), out / "sheet.png"), write_image(_moments(shown), out / "latents.png")]
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "bare": {name: a.value for name, a in shown.bare_accuracy.items()},
                "purified": {name: a.value for name, a in shown.purified_accuracy.items()},
                "intervals": {
                    "bare": {name: a.interval for name, a in shown.bare_accuracy.items()},
                    "purified": {name: a.interval for name, a in shown.purified_accuracy.items()},
                },
                "note": NOTE,
                "images": images,
                "attack": {"name": "PGD", "norm": "linf", "eps": eps, "steps": steps},
                "settings": settings.to_dict(),
                "backbone": "fashion-mnist-ct",
                "seed": seed,
                "seconds": seconds,
                "purification_seconds_per_image": shown.seconds / (2 * images),
                "files": [str(path) for path in files],
            }
        )
        return
    click.echo(f"Fashion-MNIST, first {images} test images; PGD-{steps} at linf {eps:g} on the bare classifier.")
    click.echo(f"CMAP with K = {settings.n_latents} latents, N = {settings.iterations} iterations. [95 % intervals]\n")
    rows = [["accuracy", "clean", "attacked"]]
    for name, accuracies in (("bare", shown.bare_accuracy), ("purified", shown.purified_accuracy)):
        rows.append([name, str(accuracies["clean"]), str(accuracies["attacked"])])
    print_table(rows)
    click.echo(f"\nNote: {NOTE}. This shows how it works, not how robust it is.")
    click.echo(f"{seconds:.0f} s in all, {shown.seconds / (2 * images):.2f} s per purified image. Pictures: ", nl=False)
    click.echo(", ".join(map(str, files)))


def _sheet(shown: Demonstration, eps: float) -> Image.Image:
    """Input, attacked, difference and purified image of a few, evenly over the vote's margin, each with what the
    classifier makes of it."""
    result = shown.purified_attacked
    assert result.labels is not None
    assert result.logits is not None
    rows = over_margin(result, shown.labels, min(SHOWN, len(shown.clean)))
    voter = nearest_voter(shown.attacked, result.images, result.logits, result.labels)
    captions = [
        [
            f"true: {CLASS_NAMES[shown.labels[r]]}",
            f"bare: {CLASS_NAMES[shown.bare_labels['attacked'][r]]}",
            "",
            f"vote: {CLASS_NAMES[result.labels[r]]}",
        ]
        for r in rows
    ]
    columns = {
        "input": shown.clean[rows],
        "attacked": shown.attacked[rows],
        "difference x 10": (0.5 + 10 * (shown.attacked - shown.clean)[rows]).clamp(0, 1),
        "purified": result.images[rows, voter[rows]],
    }
    title = (
        f"PGD at linf {eps:g} on the bare classifier; {NOTE}\n{NEAREST};\nimages spread evenly over the vote's margin"
    )
    return image_sheet(columns, captions, title)


def _moments(shown: Demonstration) -> Image.Image:
    """Fig. 6 of the paper: moments of the latents over the iterations, with and without eq. 12."""
    return chart_row(
        {
            "mean of the latents": [
                Curve("with constraint", shown.constrained.latent_mean.mean(1).tolist(), BLUE),
                Curve("without", shown.unconstrained.latent_mean.mean(1).tolist(), ORANGE),
            ],
            "standard deviation of the latents": [
                Curve("with constraint", shown.constrained.latent_std.mean(1).tolist(), BLUE),
                Curve("without", shown.unconstrained.latent_std.mean(1).tolist(), ORANGE),
            ],
        },
        x_label="iteration",
        targets={"mean of the latents": 0.0, "standard deviation of the latents": 1.0},
    )
