"""``cmap-defense evaluate`` and ``cmap-defense report``: how robust a model is, and the report of it drawn anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.options import (
    attack_options,
    attacks_of,
    attempt_options,
    baselines_of,
    check_options,
    class_names_of,
    data_of,
    data_options,
    model_of,
    model_options,
    protocol_of,
    subset_of,
)
from cmap_defense.cli.output import duration, json_option, out_option, print_json, print_table, progress
from cmap_defense.cli.paths import PathType
from cmap_defense.evaluation.evaluation import Evaluation, Expected, Progress
from cmap_defense.evaluation.report import Report, build_report
from cmap_defense.evaluation.report.files import load_facts, write_report
from cmap_defense.evaluation.store import Unit
from cmap_defense.ranks import ranks

__all__ = ["cost_text", "evaluate", "on_unit", "report"]

PAPER = {"count": 500, "order": "random", "runs": 3, "suite": "paper"}
"""The paper's protocol, where other options do not say otherwise."""


@click.command()
@model_options
@data_options
@attack_options
@attempt_options
@check_options
@click.option(
    "--baseline",
    multiple=True,
    metavar="NAME=PATH",
    help="Another model for the table; it takes images in [0, 1].",
)
@click.option("--preset", type=click.Choice(["paper"]), help="paper: its 500 random images, 3 runs and attacks.")
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop.")
@out_option()
@json_option
@click.pass_context
def evaluate(context: click.Context, out: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Attack a defended classifier, judge it afresh, check the attacks, report.

    Results go to OUT: one line per image, attack and seed, the adversarial images, report.json, report.md and
    report.html. Killed at any moment, the same command goes on; with other options it is refused. Under torchrun
    (torchrun -m cmap_defense evaluate ...) the work is dealt out to all processes.
    """
    given = {name for name in options if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT}
    if options["preset"] == "paper":
        options |= {name: value for name, value in PAPER.items() if name not in given}
    with ranks() as team:
        evaluation = Evaluation(
            model_of(options),
            data_of(options),
            out,
            attacks=attacks_of(options),
            protocol=protocol_of(options),
            subset=subset_of(options),
            baselines=baselines_of(options),
            threads=options["threads"],
            class_names=class_names_of(options),
        )
        first = team.rank == 0
        if first and not as_json:
            click.echo(_made_of(evaluation))
            click.echo(cost_text(evaluation.expected(), evaluation, team.world))
        if dry_run:
            if as_json:
                print_json(dataclasses.asdict(evaluation.expected()))
            return
        evaluation.run(on_unit() if first else None)
        if first:
            found = build_report(evaluation)
            files, lacking = write_report(found.to_dict(), out)
            _show(found, files, lacking, as_json=as_json)
        team.wait()


@click.command()
@click.argument("folder", type=PathType(exists=True, file_okay=False))
@json_option
def report(folder: Path, as_json: bool) -> None:
    """Write the report of an evaluation's FOLDER anew, from its report.json."""
    files, lacking = write_report(load_facts(folder), folder)
    if as_json:
        print_json({"files": [str(file) for file in files], "lacking": lacking})
        return
    click.echo("\n".join(str(file) for file in files))
    if lacking is not None:
        click.echo(f"No report.html: {lacking}", err=True)


def _made_of(evaluation: Evaluation) -> str:
    model, protocol = evaluation.model, evaluation.protocol
    assert isinstance(model, PurifiedClassifier)
    runs, classes = len(protocol.seeds), len(evaluation.images.labels.unique())
    return (
        f"{len(evaluation.images)} images of {classes} classes, {runs} run{'s' if runs > 1 else ''}, "
        f"{len(evaluation.subjects[0].attacks)} attacks; "
        f"K = {model.settings.n_latents} latents, N = {model.settings.iterations} iterations; "
        f"{evaluation.threads} thread{'s' if evaluation.threads > 1 else ''}, {evaluation.device.type}."
    )


def on_unit() -> Progress:
    """A progress bar over pieces of work."""
    bar = progress(0, "evaluating")

    def show(unit: Unit, done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.set_description(f"{unit.task}, run {unit.seed}")

    return show


def cost_text(expected: Expected, evaluation: Evaluation, world: int) -> str:
    """What is left to do, for people."""
    left, total = len(evaluation.missing()), len(evaluation.units())
    if not left:
        return f"All {total} pieces are done."
    unknown = [name for name, passes in expected.passes.items() if passes is None]
    shown = duration(expected.seconds / world)
    memory = "" if expected.bytes is None else f", {expected.bytes / 2**30:.1f} GiB of memory or more"
    text = f"{left} of {total} pieces to do: {expected.total_passes:,} backbone passes, about {shown} here{memory}."
    return text + (f"\nNot counted: {', '.join(unknown)}." if unknown else "")


def _show(found: Report, files: list[Path], lacking: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    rows = [["model", "attack", "one answer", "vote", "re-purified"]]
    rows += [[row.subject, row.attack, *map(str, (row.one_shot, row.vote, row.repurified))] for row in found.rows]
    click.echo()
    print_table(rows)
    click.echo()
    if found.headline is not None:
        click.echo(f"Worst attack on each image: {found.headline.accuracy} of the answers are right.")
    else:
        click.echo("No headline:")
        for reason in found.refused:
            click.echo(f"  {reason}")
    click.echo(f"\n{', '.join(map(str, files))}")
    if lacking is not None:
        click.echo(f"No report.html: {lacking}", err=True)
