"""``cmap-defense backbones``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.choices import WEIGHTS_DTYPES
from cmap_defense.cli.commands.shared import json_option, writable_folder
from cmap_defense.cli.grouped import Group, options_of
from cmap_defense.cli.paths import PathType

__all__ = ["backbones"]

FETCHING = options_of("Fetching")
CHECKPOINT = options_of("Checkpoint")
ARCHITECTURE = options_of("Architecture")
RECORD = options_of("Record and weights")
REPOSITORY = options_of("Repository")


@click.group(cls=Group)
def backbones() -> None:
    """List, inspect, fetch, convert, verify and share backbones."""


@backbones.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the backbones that have a name. Nothing is fetched."""
    from cmap_defense.cli.backbones import list_backbones

    list_backbones(as_json=as_json)


@backbones.command()
@click.argument("backbone")
@json_option
def info(backbone: str, as_json: bool) -> None:
    """Show what is known of BACKBONE: a name (nothing is fetched), a folder or a Hub id."""
    from cmap_defense.cli.backbones import show_backbone

    show_backbone(backbone, as_json=as_json)


@backbones.command()
@click.argument("backbone")
@FETCHING("--force", is_flag=True, help="Fetch it again even where it is on this machine already.")
@json_option
def pull(backbone: str, force: bool, as_json: bool) -> None:
    """Fetch BACKBONE, a name or a Hub id, so that it loads without a network afterwards."""
    from cmap_defense.cli.backbones import pull_backbone

    pull_backbone(backbone, force=force, as_json=as_json)


@backbones.command()
@click.argument("checkpoint", type=PathType(exists=True, dir_okay=False))
@click.argument("out", type=PathType(file_okay=False), callback=writable_folder)
@CHECKPOINT(
    "--from", "format_", type=click.Choice(["jcm", "openai"]), required=True, help="Format of the file CHECKPOINT."
)
@CHECKPOINT(
    "--kind",
    type=click.Choice(["consistency", "denoiser"]),
    default="consistency",
    show_default=True,
    help="Kind of model that the checkpoint holds.",
)
@CHECKPOINT(
    "--params",
    default="params_ema",
    show_default=True,
    help="Entry of a jcm checkpoint that holds the weights to convert.",
)
@ARCHITECTURE(
    "--config",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Setting of a jcm checkpoint's architecture that differs from CIFAR-10's, such as nf=64 or ch_mult=1,2. "
    "May be repeated.",
)
@ARCHITECTURE(
    "--image-size",
    type=click.IntRange(1),
    show_default="from the file's name",
    help="Height and width of the images, for an openai checkpoint.",
)
@ARCHITECTURE(
    "--head-channels",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Channels of one attention head, for an openai checkpoint.",
)
@RECORD("--name", show_default="OUT's name", help="Name of the backbone in its record.")
@RECORD("--description", default="", help="Description of the backbone in its record.")
@RECORD("--licence", default="", help="Licence of the weights in the record.")
@RECORD(
    "--dtype",
    type=click.Choice(WEIGHTS_DTYPES),
    default="float32",
    show_default=True,
    help="Precision of the weights in the file that is written.",
)
@json_option
def convert(**options: Any) -> None:
    """Convert CHECKPOINT into a backbone folder OUT, which load_backbone(OUT) loads.

    jcm: the JAX checkpoints of the CIFAR-10 consistency models (flax msgpack). openai: the .pt files of the ImageNet-64
    and LSUN-256 models, which become a pipeline of the diffusers library.
    """
    from cmap_defense.cli.backbones import convert_checkpoint

    convert_checkpoint(**options)


@backbones.command()
@click.argument("backbone")
@json_option
def verify(backbone: str, as_json: bool) -> None:
    """Load BACKBONE, check it, note its commit and checksum: other files are refused under its name from then on."""
    from cmap_defense.cli.backbones import verify_and_show

    verify_and_show(backbone, as_json=as_json)


@backbones.command()
@click.argument("folder", type=PathType(exists=True, file_okay=False))
@click.argument("repo_id")
@REPOSITORY("--private", is_flag=True, help="Make the repository private where it does not exist yet.")
@REPOSITORY("--message", default="Add the backbone", show_default=True, help="Message of the commit.")
@json_option
def push(folder: Path, repo_id: str, private: bool, message: str, as_json: bool) -> None:
    """Upload FOLDER with a model card to the Hub's repository REPO_ID (organisation/name)."""
    from cmap_defense.cli.backbones import push_folder

    push_folder(folder, repo_id, private=private, message=message, as_json=as_json)
