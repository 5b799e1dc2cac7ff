"""``cmap-defense study``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.choices import STUDIES
from cmap_defense.cli.commands.shared import (
    attack_options,
    data_options,
    json_option,
    model_options,
    out_option,
    protocol_options,
)
from cmap_defense.cli.grouped import Command

__all__ = ["study"]


@click.command(cls=Command)
@click.argument("name", type=click.Choice(STUDIES))
@model_options
@data_options
@attack_options
@protocol_options
@out_option()
@json_option
def study(name: str, out: Path, as_json: bool, **options: Any) -> None:
    """Vary one thing, keep the rest: the studies of the paper.

    vote: with and without the vote of the latents (Tab. XI). ssim-weight (VII). latent-weight (VIII, Fig. 3). latents:
    K (IX). beta: of the disruption attack (X). surrogate: its noise level (V). eps: higher intensities (VI).
    trajectory: along the disruption attack and the purification after it (Fig. 4 and 5).

    Every variant is an evaluation in a folder of its own below OUT; study.json, study.md and study.svg compare them.
    Killed at any moment, the same command goes on.
    """
    from cmap_defense.cli.study import run_study_command

    run_study_command(name, options, out, as_json=as_json)
