"""``cmap-defense quality``: how good a backbone is, by figures that need no download."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from cmap_defense.attacks import PGD
from cmap_defense.backbones.folder import RECORD_FILE, read_record
from cmap_defense.backbones.load import entry_of
from cmap_defense.cli import build
from cmap_defense.cli.options import command_text
from cmap_defense.cli.output import NEAREST, image_sheet, listed, sample_sheet
from cmap_defense.common.files import write_text
from cmap_defense.common.paths import expanded
from cmap_defense.common.tables import table_lines
from cmap_defense.data.files import write_image
from cmap_defense.quality import Quality, QualityRun
from cmap_defense.quality.report import sections, write_quality

STEPS = 20
"""Number of PGD steps."""

SIDE = 96
"""Smallest width of an image in the sheet, in pixels."""

RUNNING = ("out", "as_json", "device", "threads", "max_parallel", "record")
"""Options that the figures do not depend on."""


def run_quality(options: dict[str, Any]) -> build.Printed:
    """Carry out the command."""
    start = time.perf_counter()
    out, seed, as_json = options["out"], options["seed"], options["as_json"]
    if not isinstance(options["backbone"], str):
        raise click.BadParameter("the figures are those of one backbone: give it once.", param_hint="--backbone")
    folder = _recorded(options["backbone"]) if options["record"] else None
    attack = PGD(build.threat_of(options), steps=STEPS, seed=seed)
    name = options["classifier"].rpartition(":")[2]
    model, data = build.cmap_model_of(options), build.data_of(options)
    subset = build.subset_of(options, data)
    run = QualityRun(
        model,
        data,
        name=name,
        others=build.imported_models(options["other"], options, "--other", name),
        subset=subset,
        samples=options["samples"],
        features=options["features"],
        attack=attack,
        seed=seed,
    )
    if not as_json:
        settings = model.settings
        click.echo(
            f"{run.comparison.generated} samples; {len(run.images)} images, purified clean and attacked with "
            f"K = {settings.n_latents}, N = {settings.iterations}: {run.passes:,} backbone passes."
        )
    found = run.run(True)
    chosen = f"{options['data']}, {options['split']}, {subset.order}"
    about = {"command": _command(click.get_current_context()), "data": chosen}
    facts = found.to_dict() | {"data": chosen, "figures": found.figures(**about)}
    files = write_quality(facts, out)
    files.append(write_image(sample_sheet(found.samples), out / "samples.png"))
    names = run.images.class_names
    files.append(write_image(_sheet(found, names), out / "reconstructions.png"))
    if folder is not None:
        record = read_record(folder)
        changed = record.replace(figures={**record.figures, **facts["figures"]})
        write_text(folder / RECORD_FILE, changed.to_json(indent=2) + "\n")
        files.append(folder / RECORD_FILE)
    seconds = time.perf_counter() - start
    lines = []
    for _, before, table, after in sections(facts):
        lines += ["", *before, *[""] * bool(before), *table_lines(table), "", *after]
    lines.append(f"\n{seconds:.0f} s. {listed(files)}")
    return {**facts, "seconds": seconds, "files": [str(path) for path in files]}, lines


def _recorded(backbone: str) -> Path:
    """The backbone's folder, when it has a record that can be written; wrong usage otherwise, before any work."""
    folder = expanded(backbone)
    if entry_of(backbone) is not None or not (folder / RECORD_FILE).is_file():  # a name, whatever lies here too
        raise click.BadParameter(
            f"the backbone must be a folder with a {RECORD_FILE}, but is {backbone}.", param_hint="--record"
        )
    if not os.access(folder, os.W_OK):
        raise click.BadParameter(f"{folder} cannot be written to.", param_hint="--record")
    return folder


def _command(context: click.Context) -> str:
    """The command line as it was given, without what the figures do not depend on."""
    given = {
        name: value
        for name, value in context.params.items()
        if name not in RUNNING and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    return command_text("quality", context.command.params, given)


def _sheet(found: Quality, class_names: tuple[str, ...] | None) -> Image.Image:
    """The first images, each with the prediction of the classifier."""
    shown, predicted = found.reconstructions.shown, found.reconstructions.predicted

    def class_name(label: torch.Tensor) -> str:
        return str(int(label)) if class_names is None else class_names[int(label)]

    captions = [
        [f"true: {class_name(found.reconstructions.labels[row])}"]
        + [
            f"{'undefended' if kind == 'attacked' else 'vote'}: {class_name(predicted[kind][row])}"
            for kind in list(shown)[1:]
        ]
        for row in range(len(found.reconstructions.labels))
    ]
    columns = {kind.replace("_", ", "): images for kind, images in shown.items()}
    title = f"{found.attack_name}, on the undefended classifier {found.classifier};\n{NEAREST}"
    return image_sheet(columns, captions, title, scale=max(1, SIDE // shown["input"].shape[-1]))
