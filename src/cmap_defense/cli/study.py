"""``cmap-defense study``: the studies of the paper, on any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.evaluate import on_unit
from cmap_defense.cli.options import (
    attack_options,
    attacks_of,
    attempt_options,
    data_of,
    data_options,
    model_of,
    model_options,
    protocol_of,
    subset_of,
    threat_of,
)
from cmap_defense.cli.output import json_option, out_option, print_json, print_table
from cmap_defense.evaluation.accuracy import Accuracy
from cmap_defense.evaluation.report.study import write_study
from cmap_defense.evaluation.studies import STUDIES, make_study, run_study
from cmap_defense.ranks import ranks

__all__ = ["study"]

ATTACKS = ("transfer", "bpda-eot")
"""Of the standard set, where none is named: one that does not see the defence and one that does."""


@click.command()
@click.argument("name", type=click.Choice(sorted(STUDIES)))
@model_options
@data_options
@attack_options
@attempt_options
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
    if options["suite"] == "standard" and not options["only"]:
        options["only"] = ATTACKS
    with ranks() as team:
        model = model_of(options)
        chosen = make_study(name, model, attacks_of(options), threat_of(options))
        if team.rank == 0 and not as_json:
            click.echo(f"{chosen.title}. {len(chosen.variants)} variants.")
        result = run_study(
            chosen,
            model,
            data_of(options),
            out,
            protocol=protocol_of(options),
            subset=subset_of(options),
            threads=options["threads"],
            progress=on_unit() if team.rank == 0 else None,
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
