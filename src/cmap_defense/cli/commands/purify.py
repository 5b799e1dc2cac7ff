"""``cmap-defense demo`` and ``purify``."""

from __future__ import annotations

from typing import Any

import click

from cmap_defense.cli.command import Command
from cmap_defense.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    PGD,
    PathType,
    backbone_option,
    device_option,
    json_option,
    options_of,
    out_option,
    purifier_options,
    resize_option,
    seed_option,
    threads_option,
)
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.threat import ThreatModel


@click.command(cls=Command)
@DATA("--images", type=click.IntRange(1, 256), default=24, help="Number of test images to purify.")
@options_of(ThreatModel, "PGD (linf) on the bare classifier", "eps", defaults={"eps": 0.05})
@PGD("--steps", type=click.IntRange(1), default=20, help="Number of PGD steps.")
@options_of(CMAPSettings, "Purification", "n_latents", "iterations", unset="the backbone's")
@seed_option("Seed of the attack and of the purification's noise.")
@threads_option
@out_option("cmap-demo")
@json_option
def demo(**options: Any) -> None:
    """Attack a small classifier, purify, and compare; under a minute on two cores, with no network.

    Prints bare and purified accuracy on clean and on attacked images, and writes two pictures: a sheet of images, and,
    where matplotlib is installed, the latents' mean and standard deviation over the iterations, with and without the
    latent constraint.
    """
    from cmap_defense.cli.demo import run_demo

    run_demo(options)


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True, type=PathType())
@backbone_option
@MODEL(
    "--class-label",
    type=click.IntRange(0),
    help="Class of the images, as the backbone numbers it. A class-conditional backbone needs it.",
)
@purifier_options
@resize_option
@seed_option("Seed of the noise, the same for every image.")
@threads_option
@device_option
@OUTPUT("--all", "write_all", is_flag=True, help="Write all K versions, not only the one that matches best.")
@out_option()
@json_option
def purify(**options: Any) -> None:
    """Purify the image files IMAGES... and write PNG files of the same names into a folder.

    Of a folder all images are taken, those in folders below it too, and written into folders of the same names.

    There is no classifier here, so nothing is voted on: of the K purified versions of an image, the one that
    matches it best (eq. 10) is written.
    """
    from cmap_defense.cli.purify import run_purify

    run_purify(options)
