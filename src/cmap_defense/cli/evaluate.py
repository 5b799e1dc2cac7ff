"""``cmap-defense evaluate``, ``report``, ``study`` and ``compare``."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import click

from cmap_defense.attacks.suites import choose
from cmap_defense.backbones.load import load_backbone
from cmap_defense.certification.summary import read_summary
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli import build
from cmap_defense.cli.output import duration, listed, plural
from cmap_defense.common.ranks import Ranks, ranks
from cmap_defense.common.settings import near_matches
from cmap_defense.common.tables import table_lines
from cmap_defense.evaluation.comparison import (
    LONGEST_NAME,
    compare,
    compared,
    left_out_lines,
    write_comparison,
)
from cmap_defense.evaluation.differences import differences_table
from cmap_defense.evaluation.evaluation import Evaluation, Expected
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.evaluation.report import load_report, write_report
from cmap_defense.evaluation.report.tables import HEADLINE
from cmap_defense.evaluation.tasks import DEFENDED
from cmap_defense.paper import make_study, write_study
from cmap_defense.paper import run_study as run_variants
from cmap_defense.paper.studies import study_rows
from cmap_defense.purifiers import CMAP
from cmap_defense.purifiers.names import NAMES, words_of

FEW = 4
"""Defences whose differences, of each two, are printed too; those of more are in ``comparison.md``."""

PAPER = {"count": 500, "order": "random", "seeds": (0, 1, 2), "attacks": "paper"}
"""The paper's protocol, where other options do not say otherwise."""

FIXED_ATTACKS = ("beta", "surrogate", "trajectory")
"""Studies that make their own attacks."""

STUDY_ATTACKS = ("transfer", "bpda-eot")
"""Attacks of the standard set that are run where none is named, on the undefended classifier and the defence."""


def run_evaluate(options: dict[str, Any]) -> build.Printed:
    """Carry out the command evaluate."""
    if options["preset"] == "paper":
        options |= {name: value for name, value in PAPER.items() if not build.was_given(name)}
    out, as_json = options["out"], options["as_json"]
    attacks, selected = build.attacks_of(options), _selected(options)
    certified = None if options["certified"] is None else read_summary(options["certified"])
    with ranks() as team:
        model = build.model_of(options)
        chosen, left_out = (attacks, {}) if options["only"] else choose(attacks, [model])
        evaluation = Evaluation(
            model,
            out=out,
            attacks=chosen,
            baselines=build.imported_models(options["baseline"], options, "--baseline"),
            **selected,
        )
        evaluation.check_folder()
        evaluation.check_installed()
        if team.rank == 0 and not as_json:
            click.echo(_summary(evaluation))
            for line in left_out_lines(left_out):
                click.echo(line)
            click.echo(cost_text(evaluation.expected(), evaluation, team.world))
        if options["dry_run"]:
            return (dataclasses.asdict(evaluation.expected()), []) if as_json else None
        evaluation.run(True)
        found, files, lacking = None, [], None
        if team.rank == 0:
            found = dataclasses.replace(evaluation.report(), certified=certified)
            files, lacking = write_report(found, out)
        team.wait()
    if found is None:
        return None
    rows = [["model", "attack", "one-shot", "vote", "re-evaluated"]]
    rows += [[row.model, row.attack, *map(str, (row.one_shot, row.vote, row.reevaluated))] for row in found.rows]
    lines = ["No headline:", *(f"  {reason}" for reason in found.refused)]
    if found.headline is not None:
        lines = [f"Headline: {found.headline.accuracy} {HEADLINE}"]
    return found.to_dict(), ["", *table_lines(rows), "", *lines, "", listed(files, lacking, "report.html")]


def run_report(options: dict[str, Any]) -> build.Printed:
    """Carry out the command report."""
    found, certified = load_report(options["folder"]), options["certified"]
    found = found if certified is None else found.with_certificates(certified)
    files, lacking = write_report(found, options["folder"])
    if not options["as_json"]:
        listed(files, lacking, "report.html")
    return {"files": [str(file) for file in files], "lacking": lacking}, [str(file) for file in files]


def _summary(evaluation: Evaluation) -> str:
    model = evaluation.models[DEFENDED]
    assert isinstance(model, PurifiedClassifier)
    settings = model.settings.summary if isinstance(model.purifier, CMAP) else repr(model.purifier)
    classes = len(evaluation.images.labels.unique())
    return (
        f"{plural(len(evaluation.images), 'image')} of {classes} class{'' if classes == 1 else 'es'}, "
        f"{plural(len(evaluation.protocol.seeds), 'run')}, {plural(len(evaluation.attacks[DEFENDED]), 'attack')}; "
        f"{settings}; {plural(evaluation.threads, 'thread')}, {evaluation.device.type}."
    )


def cost_text(expected: Expected, evaluation: Evaluation, world: int) -> str:
    """What is left to do, for people."""
    left, total = len(evaluation.missing()), len(evaluation.units())
    if not left:
        return f"All {total} work units are done."
    unknown = [name for name, passes in expected.passes.items() if passes is None]
    shown, bound = duration(expected.seconds / world), "at least" if unknown else "about"
    memory = "" if expected.bytes is None else f", {expected.bytes / 2**30:.1f} GiB of memory or more"
    text = (
        f"{left} of {total} work units to do: {expected.total_passes:,} network passes, {bound} {shown} here{memory}."
    )
    return text + (f"\nNot included, measured in their first work unit: {', '.join(unknown)}." if unknown else "")


def run_study(options: dict[str, Any]) -> build.Printed:
    """Carry out the command study."""
    if options["name"] in FIXED_ATTACKS:
        for name in ("attacks", "only", "steps", "eot"):
            build.refuse(name, f"the study {options['name']} has attacks of its own: leave the option out.")
    elif options["attacks"] == "standard" and not options["only"]:
        options["only"] = STUDY_ATTACKS
    attacks, threat = build.attacks_of(options), build.threat_of(options)
    out, selected = options["out"], _selected(options)
    with ranks() as team:
        model = build.cmap_model_of(options, "give CMAP a noise level: --purifier-set level=1")
        chosen = make_study(options["name"], model, attacks, threat)
        if team.rank == 0 and not options["as_json"]:
            click.echo(f"{chosen.title}. {len(chosen.variants)} variants.")
        study = run_variants(chosen, model, out=out, progress=True, **selected)
        files, lacking = write_study(study, out) if team.rank == 0 else ([], None)
        team.wait()
    return (study, _compared(study_rows(study), files, lacking, options)) if team.rank == 0 else None


def run_compare(options: dict[str, Any]) -> build.Printed:
    """Carry out the command compare."""
    attacks, out, selected = build.attacks_of(options), options["out"], _selected(options)
    with ranks() as team:
        models = _models(options)
        attacks, left_out = (attacks, {}) if options["only"] else choose(attacks, models.values())
        if team.rank == 0 and not options["as_json"]:
            for line in left_out_lines(left_out):
                click.echo(line)
        evaluations, printed = compared(models, out=out, attacks=attacks, **selected), None
        if team.rank == 0 and (options["dry_run"] or not options["as_json"]):
            printed = _costs(evaluations, team)
        if options["dry_run"]:
            return printed
        if printed is not None:
            click.echo("\n".join(printed[1]))
        found = compare(models, out=out, attacks=attacks, progress=True, **selected)
        found = dataclasses.replace(found, left_out=left_out)
        files, lacking = write_comparison(found, out) if team.rank == 0 else ([], None)
        team.wait()
    if team.rank:
        return None
    shown: list[str] = []
    if 1 < len(models) <= FEW:
        shown = ["", "Differences, image by image:", "", *table_lines(differences_table(found.differences))]
    return found.to_dict(), _compared(found.table(), files, lacking, options, shown)


def _costs(evaluations: dict[str, Evaluation], team: Ranks) -> tuple[dict[str, Any], list[str]]:
    """What is left to do for each defence."""
    costs = {name: evaluation.expected() for name, evaluation in evaluations.items()}
    lines = [f"{name}: {cost_text(costs[name], evaluations[name], team.world)}" for name in costs]
    seconds = duration(sum(cost.seconds for cost in costs.values()) / team.world)
    found = {name: dataclasses.asdict(cost) for name, cost in costs.items()}
    least = any(passes is None for cost in costs.values() for passes in cost.passes.values())
    return found, [*lines, f"{'At least' if least else 'About'} {seconds} in all."]


def _selected(options: dict[str, Any]) -> dict[str, Any]:
    """On which images, how often, and with how many threads."""
    data, protocol = build.data_of(options), build.settings_of(Protocol, options)
    return {"data": data, "protocol": protocol, "subset": build.subset_of(options, data), "threads": options["threads"]}


def _compared(
    rows: list[list[str]], files: list[Any], lacking: str | None, options: dict[str, Any], further: Sequence[str] = ()
) -> list[str]:
    return ["", *table_lines(rows), *further, "", listed(files, None if options["as_json"] else lacking)]


def _models(options: dict[str, Any]) -> dict[str, PurifiedClassifier]:
    """The defences by name, that of ``_folder_name``."""
    device, classifier, given = build.device_of(options), build.classifier_of(options), options["backbone"]
    loaded = [load_backbone(name).to(device) for name in ([given] if isinstance(given, str) else given)]
    backbone: Any = loaded[0] if len(loaded) == 1 else tuple(loaded)
    found: dict[str, PurifiedClassifier] = {}
    for text in options["purifiers"]:
        with build.usage_errors():
            words = words_of(text)
        name = _folder_name(text)
        if not words:
            raise click.BadParameter(f"{text!r} is no purifier: give one such as 'one-step'.", param_hint="--purifier")
        if name in found:
            raise click.BadParameter(f"{text!r} is given twice.", param_hint="--purifier")
        if words[0] not in NAMES:
            hint = near_matches(words[0], NAMES)
            raise click.BadParameter(f"there is no purifier {words[0]!r}.{hint}", param_hint="--purifier")
        with build.usage_errors():
            purifier = {"purifier": words[0], "purifier_set": words[1:]}
            found[name] = build.defended(classifier, backbone, options | purifier)
    return found


def _folder_name(text: str) -> str:
    """The text of a purifier with hyphens for spaces; where it is too long, its beginning and a checksum."""
    name = "-".join(re.sub(r"\s*,\s*", ",", text).split()).replace("/", "_")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
