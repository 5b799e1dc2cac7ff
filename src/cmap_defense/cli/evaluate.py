"""``cmap-defense evaluate`` and ``cmap-defense report``: how robust a model is, and the report of it drawn anew."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.options import (
    attacks_of,
    baselines_of,
    class_names_of,
    data_of,
    model_of,
    protocol_of,
    subset_of,
)
from cmap_defense.cli.output import duration, print_json, print_table
from cmap_defense.cli.progress import Progress
from cmap_defense.evaluation.evaluation import Evaluation, Expected
from cmap_defense.evaluation.evaluation import Progress as OnUnit
from cmap_defense.evaluation.report import Report, load_report, write_report
from cmap_defense.evaluation.report.tables import HEADLINE
from cmap_defense.evaluation.results import WorkUnit
from cmap_defense.evaluation.tasks import DEFENDED
from cmap_defense.ranks import Ranks, ranks

__all__ = ["cost_text", "run_evaluate", "run_report", "unit_progress"]


def run_evaluate(options: dict[str, Any], out: Path, *, as_json: bool, dry_run: bool) -> None:
    """Carry out the command evaluate."""
    attacks, data = attacks_of(options), data_of(options)
    with ranks() as team:
        evaluation = Evaluation(
            model_of(options),
            data,
            out,
            attacks=attacks,
            protocol=protocol_of(options),
            subset=subset_of(options, data),
            baselines=baselines_of(options),
            threads=options["threads"],
            class_names=class_names_of(options),
        )
        evaluation.check_folder()
        first = team.rank == 0
        if first and not as_json:
            click.echo(_made_of(evaluation))
            click.echo(cost_text(evaluation.expected(), evaluation, team.world))
        if dry_run:
            if as_json:
                print_json(dataclasses.asdict(evaluation.expected()))
            return
        with unit_progress(team) as progress:
            evaluation.run(progress)
        if first:
            found = evaluation.report()
            files, lacking = write_report(found, out)
            _show(found, files, lacking, as_json=as_json)
        team.wait()


def run_report(folder: Path, *, as_json: bool) -> None:
    """Carry out the command report."""
    files, lacking = write_report(load_report(folder), folder)
    if as_json:
        print_json({"files": [str(file) for file in files], "lacking": lacking})
        return
    click.echo("\n".join(str(file) for file in files))
    if lacking is not None:
        click.echo(f"No report.html: {lacking}", err=True)


def _made_of(evaluation: Evaluation) -> str:
    model, protocol = evaluation.models[DEFENDED], evaluation.protocol
    assert isinstance(model, PurifiedClassifier)
    runs, classes = len(protocol.seeds), len(evaluation.images.labels.unique())
    attacks = len(evaluation.attacks[DEFENDED])
    return (
        f"{len(evaluation.images)} images of {classes} classes, {runs} run{'s' if runs > 1 else ''}, "
        f"{attacks} attack{'' if attacks == 1 else 's'}; "
        f"K = {model.settings.n_latents} latents, N = {model.settings.iterations} iterations; "
        f"{evaluation.threads} thread{'s' if evaluation.threads > 1 else ''}, {evaluation.device.type}."
    )


@contextlib.contextmanager
def unit_progress(team: Ranks) -> Iterator[OnUnit | None]:
    """What an evaluation calls before each work unit, to show how far it is; None for all ranks but the first."""
    if team.rank != 0:
        yield None
        return
    with Progress(0, "evaluating") as progress:

        def show(unit: WorkUnit, done: int, total: int) -> None:
            progress.at(done, total, what=f"{unit.task}, run {unit.seed}")

        yield show


def cost_text(expected: Expected, evaluation: Evaluation, world: int) -> str:
    """What is left to do, for people."""
    left, total = len(evaluation.missing()), len(evaluation.units())
    if not left:
        return f"All {total} work units are done."
    unknown = [name for name, passes in expected.passes.items() if passes is None]
    shown = duration(expected.seconds / world)
    memory = "" if expected.bytes is None else f", {expected.bytes / 2**30:.1f} GiB of memory or more"
    text = f"{left} of {total} work units to do: {expected.total_passes:,} network passes, about {shown} here{memory}."
    return text + (f"\nNot included, measured in their first work unit: {', '.join(unknown)}." if unknown else "")


def _show(found: Report, files: list[Path], lacking: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    rows = [["model", "attack", "one-shot", "vote", "re-evaluated"]]
    rows += [[row.model, row.attack, *map(str, (row.one_shot, row.vote, row.reevaluated))] for row in found.rows]
    click.echo()
    print_table(rows)
    click.echo()
    if found.headline is not None:
        click.echo(f"Headline: {found.headline.accuracy} {HEADLINE}")
    else:
        click.echo("No headline:")
        for reason in found.refused:
            click.echo(f"  {reason}")
    click.echo(f"\n{', '.join(map(str, files))}")
    if lacking is not None:
        click.echo(f"No report.html: {lacking}", err=True)
