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
from cmap_defense.evaluation.accuracy import Accuracy
from cmap_defense.evaluation.report.study import write_study
from cmap_defense.evaluation.studies import make_study, run_study
from cmap_defense.ranks import ranks

__all__ = ["run_study_command"]

ATTACKS = ("transfer", "bpda-eot")
"""Of the standard set, where none is named: one that does not see the defence and one that does."""


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
            facts = result.to_dict()
            files, lacking = write_study(facts, out)
            if as_json:
                print_json(facts)
            else:
                _show(facts, files, lacking)
        team.wait()


def _show(facts: dict[str, Any], files: list[Path], lacking: str | None) -> None:
    rows = [[facts["axis"], "attack", "one answer", "vote", "re-purified", "one latent"]]
    for entry in facts["rows"]:
        row = entry["row"]
        shown = [str(Accuracy(row[name]["correct"], row[name]["total"])) for name in ("average", "vote", "repurified")]
        latent = "" if row["one_latent"] is None else f"{row['one_latent']:.3f}"
        rows.append([entry["variant"], entry["attack"], *shown, latent])
    click.echo()
    print_table(rows)
    click.echo(f"\n{', '.join(map(str, files))}")
    if lacking is not None:
        click.echo(f"No plot: {lacking}", err=True)
