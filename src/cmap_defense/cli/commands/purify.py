"""``cmap-defense purify``."""

from __future__ import annotations

from typing import Any

import click

from cmap_defense.cli.commands.shared import (
    MODEL,
    OUTPUT,
    backbone_option,
    device_option,
    iterations_option,
    json_option,
    latents_option,
    out_option,
    resize_option,
    seed_option,
    threads_option,
)
from cmap_defense.cli.grouped import Command
from cmap_defense.cli.paths import PathType

__all__ = ["purify"]


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True, type=PathType())
@backbone_option
@MODEL(
    "--class-label",
    type=click.IntRange(0),
    help="Class of the images, as the backbone numbers it. A class-conditional backbone needs it.",
)
@latents_option
@iterations_option
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

    run_purify(**options)
