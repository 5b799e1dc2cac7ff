"""``cmap-defense evaluate``, ``report`` and ``study``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cmap_defense.certification.summary import read_summary
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.build import (
    attacks_of,
    class_names_of,
    cmap_model_of,
    data_of,
    imported_models,
    model_of,
    settings_of,
    subset_of,
    threat_of,
)
from cmap_defense.cli.output import duration, print_json, print_table
from cmap_defense.common.progress import Progress
from cmap_defense.common.ranks import Ranks, ranks
from cmap_defense.evaluation.evaluation import Evaluation, Expected, OnUnit
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.evaluation.report import Report, load_report, write_report
from cmap_defense.evaluation.report.tables import HEADLINE
from cmap_defense.evaluation.results import WorkUnit
from cmap_defense.evaluation.tasks import DEFENDED
from cmap_defense.paper import make_study, write_study
from cmap_defense.paper import run_study as run_variants
from cmap_defense.paper.report import study_rows
from cmap_defense.purifiers import CMAP

STUDY_ATTACKS = ("transfer", "bpda-eot")
"""Attacks of the standard set that are run where none is named: one on the bare classifier, one on the defence."""


def run_evaluate(options: dict[str, Any]) -> None:
    """Carry out the command with its options."""
    out, as_json = options["out"], options["as_json"]
    attacks, protocol, data = attacks_of(options), settings_of(Protocol, options), data_of(options)
    certified = None if options["certified"] is None else read_summary(options["certified"])
    with ranks() as team:
        model = model_of(options)
        left_out = [name for name, attack in attacks.items() if not attack.suits(model) and name not in options["only"]]
        attacks = {name: attack for name, attack in attacks.items() if name not in left_out}
        evaluation = Evaluation(
            model,
            data,
            out,
            attacks=attacks,
            protocol=protocol,
            subset=subset_of(options, data),
            baselines=imported_models(options["baseline"], options, "--baseline"),
            threads=options["threads"],
            class_names=class_names_of(options),
        )
        evaluation.check_folder()
        first = team.rank == 0
        if first and not as_json:
            click.echo(_summary(evaluation))
            if left_out:
                click.echo(f"Left out, since this purifier has no latents to attack: {', '.join(left_out)}.")
            click.echo(cost_text(evaluation.expected(), evaluation, team.world))
        if options["dry_run"]:
            if as_json:
                print_json(dataclasses.asdict(evaluation.expected()))
            return
        with unit_progress(team) as progress:
            evaluation.run(progress)
        if first:
            found = dataclasses.replace(evaluation.report(), certified=certified)
            files, lacking = write_report(found, out)
            _show(found, files, lacking, as_json=as_json)
        team.wait()


def run_report(folder: Path, certified: Path | None, *, as_json: bool) -> None:
    """Carry out the command report."""
    found = load_report(folder)
    files, lacking = write_report(found if certified is None else found.with_certificates(certified), folder)
    if as_json:
        print_json({"files": [str(file) for file in files], "lacking": lacking})
        return
    click.echo("\n".join(str(file) for file in files))
    if lacking is not None:
        click.echo(f"No report.html: {lacking}", err=True)


def _summary(evaluation: Evaluation) -> str:
    model, threads = evaluation.models[DEFENDED], evaluation.threads
    assert isinstance(model, PurifiedClassifier)
    purifier = model.purifier
    settings = repr(purifier)
    if isinstance(purifier, CMAP):
        settings = f"K = {purifier.settings.n_latents} latents, N = {purifier.settings.iterations} iterations"
    runs, attacks = len(evaluation.protocol.seeds), len(evaluation.attacks[DEFENDED])
    return (
        f"{len(evaluation.images)} images of {len(evaluation.images.labels.unique())} classes, "
        f"{runs} run{'' if runs == 1 else 's'}, {attacks} attack{'' if attacks == 1 else 's'}; {settings}; "
        f"{threads} thread{'' if threads == 1 else 's'}, {evaluation.device.type}."
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


def run_study(options: dict[str, Any]) -> None:
    """Carry out the command with its options."""
    if options["attacks"] == "standard" and not options["only"]:
        options["only"] = STUDY_ATTACKS
    attacks, threat, protocol = attacks_of(options), threat_of(options), settings_of(Protocol, options)
    out, as_json = options["out"], options["as_json"]
    with ranks() as team:
        model, data = cmap_model_of(options), data_of(options)
        chosen = make_study(options["name"], model, attacks, threat)
        if team.rank == 0 and not as_json:
            click.echo(f"{chosen.title}. {len(chosen.variants)} variants.")
        with unit_progress(team) as progress:
            study = run_variants(
                chosen,
                model,
                data,
                out,
                protocol=protocol,
                subset=subset_of(options, data),
                threads=options["threads"],
                progress=progress,
            )
        if team.rank == 0:
            files, lacking = write_study(study, out)
            if as_json:
                print_json(study)
            else:
                _show_study(study, files, lacking)
        team.wait()


def _show_study(study: dict[str, Any], files: list[Path], lacking: str | None) -> None:
    click.echo()
    print_table(study_rows(study))
    click.echo(f"\n{', '.join(map(str, files))}")
    if lacking is not None:
        click.echo(f"No plot: {lacking}", err=True)
