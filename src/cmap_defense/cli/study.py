"""``cmap-defense study``: the studies of the paper, on any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.evaluate import unit_progress
from cmap_defense.cli.options import (
    attacks_of,
    data_of,
    model_of,
    protocol_of,
    subset_of,
    threat_of,
)
from cmap_defense.cli.output import print_json, print_table
from cmap_defense.paper import make_study, run_study, write_study
from cmap_defense.paper.report import study_rows
from cmap_defense.ranks import ranks

__all__ = ["run_study_command"]

ATTACKS = ("transfer", "bpda-eot")
"""Of the standard set, where none is named: one that does not evaluate the defence and one that does."""


def run_study_command(name: str, options: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Carry out the command."""
    if options["suite"] == "standard" and not options["only"]:
        options["only"] = ATTACKS
    attacks, threat = attacks_of(options), threat_of(options)
    with ranks() as team:
        model, data = model_of(options), data_of(options)
        chosen = make_study(name, model, attacks, threat)
        if team.rank == 0 and not as_json:
            click.echo(f"{chosen.title}. {len(chosen.variants)} variants.")
        with unit_progress(team) as progress:
            result = run_study(
                chosen,
                model,
                data,
                out,
                protocol=protocol_of(options),
                subset=subset_of(options, data),
                threads=options["threads"],
                progress=progress,
            )
        if team.rank == 0:
            study = result.to_dict()
            files, lacking = write_study(study, out)
            if as_json:
                print_json(study)
            else:
                _show(study, files, lacking)
        team.wait()


def _show(study: dict[str, Any], files: list[Path], lacking: str | None) -> None:
    rows = study_rows(study)
    click.echo()
    print_table(rows)
    click.echo(f"\n{', '.join(map(str, files))}")
    if lacking is not None:
        click.echo(f"No plot: {lacking}", err=True)
