"""``cmap-defense analyse``."""

from __future__ import annotations

from typing import Any

import click

from cmap_defense.cli.choices import EMBEDDED
from cmap_defense.cli.commands.shared import (
    ATTACKS,
    Size,
    data_options,
    json_option,
    model_options,
    out_option,
    seed_option,
)
from cmap_defense.cli.grouped import Command, options_of

__all__ = ["analyse"]

DEFAULTS = {"backbone": "fashion-mnist-ct", "classifier": EMBEDDED, "data": EMBEDDED, "count": 64}
"""What ships with the package."""

DISTANCE = options_of("Distance")


@click.command(cls=Command, context_settings={"default_map": DEFAULTS, "show_default": True})
@model_options
@data_options
@DISTANCE(
    "--reference",
    type=click.IntRange(2),
    default=128,
    help="Number of clean images to measure from, those that follow the analysed ones.",
)
@DISTANCE(
    "--levels",
    type=click.IntRange(1, 1000),
    default=20,
    help="Number of noise levels (T): the first of 1000.",
)
@DISTANCE(
    "--kernel",
    type=click.Choice(["gaussian", "deep"]),
    default="gaussian",
    help="Kernel of the squared MMD: a Gaussian one, or a trained one.",
)
@DISTANCE(
    "--training",
    type=click.IntRange(2),
    default=64,
    help="Number of images that --kernel deep is trained on, those that follow the references.",
)
@DISTANCE(
    "--purify/--no-purify",
    default=True,
    help="Measure purified images too, which takes most of the time.",
)
@ATTACKS(
    "--eps", type=Size(largest=1), default="0.05", help="Largest perturbation of the linf attack, for images in [0, 1]."
)
@ATTACKS("--steps", type=click.IntRange(1), default=20, help="Number of PGD steps.")
@seed_option("Seed of the attack and of all noise.")
@out_option("cmap-detection")
@json_option
def analyse(**options: Any) -> None:
    """Measure how far from clean images attacked, generated and purified ones lie (Fig. 1 of the paper).

    Far is the squared MMD between the expected perturbation scores (EPS) of one image and of clean reference images.
    Without options it looks at what ships with the package and needs no network. The attack is PGD on the bare
    classifier. Prints a table, and writes detection.json and detection.png.
    """
    from cmap_defense.cli.analyse import run_analyse

    run_analyse(**options)
