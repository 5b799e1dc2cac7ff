"""``cmap-defense demo``."""

from __future__ import annotations

from typing import Any

import click

from cmap_defense.cli.commands.shared import (
    ATTACKS,
    DATA,
    Size,
    iterations_option,
    json_option,
    latents_option,
    out_option,
    seed_option,
    threads_option,
)
from cmap_defense.cli.grouped import Command

__all__ = ["demo"]


@click.command(cls=Command)
@DATA("--images", type=click.IntRange(1, 256), default=24, show_default=True, help="Number of test images to purify.")
@ATTACKS(
    "--eps",
    type=Size(zero=True, largest=1),
    default="0.05",
    show_default=True,
    help="Largest perturbation of the linf attack, for images in [0, 1].",
)
@ATTACKS("--steps", type=click.IntRange(1), default=20, show_default=True, help="Number of PGD steps.")
@latents_option
@iterations_option
@seed_option("Seed of the attack and of the purification's noise.")
@threads_option
@out_option("cmap-demo")
@json_option
def demo(**options: Any) -> None:
    """Attack a small classifier, purify, and compare; under a minute on two cores, with no network.

    Prints bare and purified accuracy on clean and on attacked images, and writes two pictures: a sheet of images,
    and the latents' mean and standard deviation over the iterations, with and without the latent constraint.
    """
    from cmap_defense.cli.demo import run_demo

    run_demo(**options)
