"""``cmap-defense compare``."""

from __future__ import annotations

from typing import Any

import click

from cmap_defense.backbones.load import load_backbone
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.build import (
    attacks_of,
    data_of,
    defended,
    device_of,
    imported_model,
    settings_of,
    subset_of,
    usage_errors,
)
from cmap_defense.cli.evaluate import unit_progress
from cmap_defense.cli.output import print_json, print_table
from cmap_defense.common.ranks import ranks
from cmap_defense.common.settings import near_matches
from cmap_defense.evaluation.comparison import compare, write_comparison
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.purifiers.names import NAMES


def run_compare(options: dict[str, Any]) -> None:
    """Carry out the command with its options."""
    attacks, protocol, out = attacks_of(options), settings_of(Protocol, options), options["out"]
    with ranks() as team:
        models, data = _models(options), data_of(options)
        for name in [name for name, attack in attacks.items() if not all(map(attack.suits, models.values()))]:
            if name not in options["only"]:
                del attacks[name]
        with unit_progress(team) as progress:
            found = compare(
                models,
                data,
                out,
                attacks=attacks,
                protocol=protocol,
                subset=subset_of(options, data),
                threads=options["threads"],
                progress=None if progress is None else lambda _, unit, done, total: progress(unit, done, total),
            )
        if team.rank == 0:
            files, lacking = write_comparison(found, out)
            if options["as_json"]:
                print_json(found.to_dict())
            else:
                click.echo()
                print_table(found.table())
                click.echo(f"\n{', '.join(map(str, files))}")
            if lacking is not None:
                click.echo(f"No plot: {lacking}", err=True)
        team.wait()


def _models(options: dict[str, Any]) -> dict[str, PurifiedClassifier]:
    """The defences by name: the texts of ``--purifier`` with hyphens for spaces."""
    device = device_of(options)
    if len(options["backbones"]) > 2:
        raise click.BadParameter("give one backbone, or two of different kinds.", param_hint="--backbone")
    classifier = imported_model(options["classifier"], options["weights"], device, "--classifier")
    loaded = [load_backbone(name).to(device) for name in options["backbones"]]
    backbone: Any = loaded[0] if len(loaded) == 1 else tuple(loaded)
    found: dict[str, PurifiedClassifier] = {}
    for text in options["purifiers"]:
        words = text.split()
        name = "-".join(words).replace("/", "_")
        if not words or name in found:
            raise click.BadParameter(f"{text!r} is empty or given twice.", param_hint="--purifier")
        if words[0] not in NAMES:
            hint = near_matches(words[0], NAMES)
            raise click.BadParameter(f"there is no purifier {words[0]!r}.{hint}", param_hint="--purifier")
        with usage_errors():
            purifier = {"purifier": words[0], "purifier_set": words[1:]}
            found[name] = defended(classifier, backbone, options | purifier)
    return found
