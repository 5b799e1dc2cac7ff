"""``cmap-defense evaluate`` and ``cmap-defense report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.commands.shared import (
    DATA,
    MODEL,
    RUNNING,
    attack_options,
    check_options,
    data_options,
    json_option,
    model_options,
    out_option,
    protocol_options,
)
from cmap_defense.cli.grouped import Command
from cmap_defense.cli.paths import PathType

__all__ = ["evaluate", "report"]

PAPER = {"count": 500, "order": "random", "runs": 3, "suite": "paper"}
"""The paper's protocol, where other options do not say otherwise."""


@click.command(cls=Command)
@model_options
@MODEL(
    "--baseline",
    multiple=True,
    metavar="NAME=PATH",
    help="Another model for the table, made as the classifier is; it takes images in [0, 1]. May be repeated.",
)
@data_options
@DATA(
    "--preset",
    type=click.Choice(["paper"]),
    help="Take the paper's 500 random images, 3 runs and attacks where no other option says otherwise.",
)
@attack_options
@protocol_options
@check_options
@RUNNING("--dry-run", is_flag=True, help="Print what the evaluation would cost, and stop.")
@out_option()
@json_option
@click.pass_context
def evaluate(context: click.Context, out: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Attack a defended classifier, re-evaluate it, check the attacks, report.

    Results go to OUT: one line per image, attack and seed, the adversarial images, report.json, report.md and
    report.html. Killed at any moment, the same command goes on; with other options it is refused. Under torchrun
    (torchrun -m cmap_defense evaluate ...) the work is dealt out to all processes.
    """
    from cmap_defense.cli.evaluate import run_evaluate

    if options.pop("preset") == "paper":
        chosen = {name for name in options if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT}
        options |= {name: value for name, value in PAPER.items() if name not in chosen}
    run_evaluate(options, out, as_json=as_json, dry_run=dry_run)


@click.command(cls=Command)
@click.argument("folder", type=PathType(exists=True, file_okay=False))
@json_option
def report(folder: Path, as_json: bool) -> None:
    """Write the report of an evaluation's FOLDER anew, from its report.json."""
    from cmap_defense.cli.evaluate import run_report

    run_report(folder, as_json=as_json)
