"""``cmap-defense quality``."""

from __future__ import annotations

from typing import Any

import click

from cmap_defense.cli.choices import QUALITY_SAMPLES
from cmap_defense.cli.commands.shared import (
    ATTACKS,
    MODEL,
    OUTPUT,
    Size,
    data_options,
    json_option,
    model_options,
    out_option,
    seed_option,
)
from cmap_defense.cli.grouped import Command, options_of

__all__ = ["quality"]

SAMPLES = options_of("Samples")


@click.command(cls=Command)
@model_options
@MODEL(
    "--and",
    "beside",
    multiple=True,
    metavar="NAME=PATH[@WEIGHTS]",
    help="Another classifier to measure with, made as the first one is. May be repeated.",
)
@data_options
@SAMPLES(
    "--samples",
    type=click.IntRange(2),
    default=QUALITY_SAMPLES,
    show_default=True,
    help="Number of generated images that are compared with real ones.",
)
@SAMPLES(
    "--features",
    metavar="MODULE",
    show_default="the last nn.Linear",
    help="Module of the classifier whose input is compared.",
)
@ATTACKS(
    "--eps",
    type=Size(largest=1),
    default="8/255",
    show_default=True,
    help="Largest perturbation of the linf attack, for images in [0, 1].",
)
@seed_option("Seed of all noise.")
@OUTPUT("--record", is_flag=True, help="Write the figures into the backbone's record too.")
@out_option()
@json_option
@click.pass_context
def quality(context: click.Context, **options: Any) -> None:
    """Measure how good a backbone is, with what is on this machine.

    Its samples are compared with real images, by the Frechet distance in the classifier's features and, where its
    network is there, by FID. Clean images are purified and classified, and so are attacked ones; PGD with 20 steps
    attacks the bare classifier, which does not know the defence. The cost is printed first. Writes quality.json,
    quality.md, samples.png and reconstructions.png.
    """
    from cmap_defense.cli.quality import run_quality

    run_quality(context, **options)
