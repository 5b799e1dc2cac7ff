"""``cmap-defense evaluate``, ``report``, ``study``, ``compare`` and ``detect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.command import Command, in_group
from cmap_defense.cli.options import (
    DATA,
    EMBEDDED,
    MODEL,
    OUTPUT,
    PGD,
    PURIFICATION,
    RUNNING,
    Choice,
    PathType,
    attack_options,
    check_options,
    classifier_options,
    data_options,
    json_option,
    model_options,
    options_of,
    out_option,
    protocol_options,
    seed_option,
    wrapper_options,
)
from cmap_defense.threat import ThreatModel

STUDIES = ("beta", "eps", "latent-weight", "latents", "ssim-weight", "surrogate", "trajectory", "vote")

certified_option = OUTPUT(
    "--certified",
    type=PathType(exists=True, file_okay=False),
    help="Folder of cmap-defense certify, whose certified accuracy the report shows besides.",
)

PAPER = {"count": 500, "order": "random", "seeds": (0, 1, 2), "attacks": "paper"}
"""The paper's protocol, where other options do not say otherwise."""


@click.command(cls=Command)
@model_options
@MODEL(
    "--baseline",
    multiple=True,
    metavar="NAME=PATH[@WEIGHTS]",
    help="Another model for the table, made as the classifier is; it takes images in [0, 1]. May be repeated.",
)
@data_options
@DATA(
    "--preset",
    type=Choice(["paper"]),
    help="Take the paper's 500 random images, 3 runs and attacks where no other option says otherwise.",
)
@attack_options
@protocol_options
@check_options
@RUNNING("--dry-run", is_flag=True, help="Print what the evaluation would cost, and stop.")
@certified_option
@out_option()
@json_option
@click.pass_context
def evaluate(context: click.Context, **options: Any) -> None:
    """Attack a defended classifier, re-evaluate it, check the attacks, report.

    Results go to OUT: one line per image, attack and seed, the adversarial images, report.json, report.md and
    report.html. Killed at any moment, the same command continues; with other options it is refused. Under torchrun
    (torchrun -m cmap_defense evaluate ...) all processes share the work.
    """
    from cmap_defense.cli.evaluate import run_evaluate

    if options["preset"] == "paper":
        chosen = {name for name in options if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT}
        options |= {name: value for name, value in PAPER.items() if name not in chosen}
    run_evaluate(options)


@click.command(cls=Command)
@click.argument("folder", type=PathType(exists=True, file_okay=False))
@certified_option
@json_option
def report(folder: Path, certified: Path | None, as_json: bool) -> None:
    """Write the report of an evaluation's FOLDER anew, from its report.json."""
    from cmap_defense.cli.evaluate import run_report

    run_report(folder, certified, as_json=as_json)


@click.command(cls=Command)
@click.argument("name", type=Choice(STUDIES))
@model_options
@data_options
@attack_options
@protocol_options
@out_option()
@json_option
def study(**options: Any) -> None:
    """Vary one thing, keep the rest: the studies of the paper.

    vote: with and without the vote of the latents (Tab. XI). ssim-weight (VII). latent-weight (VIII, Fig. 3). latents:
    K (IX). beta: of the disruption attack (X). surrogate: its noise level (V). eps: higher intensities (VI).
    trajectory: along the disruption attack and the purification after it (Fig. 4 and 5).

    Every variant is an evaluation in a folder of its own below OUT; study.json, study.md and study.svg compare them.
    Killed at any moment, the same command continues.
    """
    from cmap_defense.cli.evaluate import run_study

    run_study(options)


@click.command(cls=Command, context_settings={"default_map": {"attacks": "exact"}})
@MODEL(
    "-b",
    "--backbone",
    "backbones",
    multiple=True,
    required=True,
    help="Backbone to purify with: a name, a folder or a Hub id. Twice for a consistency model and a denoiser; each "
    "purifier takes the one that it needs.",
)
@classifier_options
@PURIFICATION(
    "-p",
    "--purifier",
    "purifiers",
    multiple=True,
    required=True,
    metavar='"NAME KEY=VALUE ..."',
    help='Purifier to compare, in quotes with its settings: "diffpure t=75 n_latents=4". May be repeated.',
)
@wrapper_options
@data_options
@attack_options
@protocol_options
@out_option()
@json_option
def compare(**options: Any) -> None:
    """Compare purifiers: one classifier, the same images, the same attacks.

    Every purifier is an evaluation in a folder of its own below OUT; comparison.json, comparison.md and comparison.svg
    put them side by side. Killed at any moment, the same command continues. Compare at equal n_latents: a vote gets
    more robust as it grows.
    """
    from cmap_defense.cli.compare import run_compare

    run_compare(options)


DEFAULTS = {"backbone": "fashion-mnist-ct", "classifier": EMBEDDED, "data": EMBEDDED, "count": 64}
"""What ships with the package."""

DISTANCE = in_group("Distance")


@click.command(cls=Command, context_settings={"default_map": DEFAULTS, "show_default": True})
@model_options
@data_options
@DISTANCE(
    "--reference",
    type=click.IntRange(2),
    default=128,
    help="Number of clean images to measure from, those that follow the measured ones.",
)
@DISTANCE("--levels", type=click.IntRange(1, 1000), default=20, help="Number of noise levels (T): the first of 1000.")
@DISTANCE(
    "--kernel",
    type=Choice(["gaussian", "deep"]),
    default="gaussian",
    help="Kernel of the squared MMD: a Gaussian one, or a trained one.",
)
@DISTANCE(
    "--training",
    type=click.IntRange(2),
    default=64,
    help="Number of images that --kernel deep is trained on, those that follow the references.",
)
@DISTANCE("--purify/--no-purify", default=True, help="Measure purified images too, which takes most of the time.")
@options_of(ThreatModel, "PGD (linf) on the bare classifier", "eps", defaults={"eps": 0.05})
@PGD("--steps", type=click.IntRange(1), default=20, help="Number of PGD steps.")
@seed_option("Seed of the attack and of all noise.")
@out_option("cmap-detection")
@json_option
def detect(**options: Any) -> None:
    """Measure how far from clean images attacked, generated and purified ones lie (Fig. 1 of the paper).

    The distance is the squared MMD between the expected perturbation scores (EPS) of one image and of clean reference
    images. Without options the command uses what ships with the package and needs no network. Prints a table, and
    writes detection.json and detection.png.
    """
    from cmap_defense.cli.detect import run_detect

    run_detect(options)
