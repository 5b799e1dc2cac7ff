"""``cmap-defense quality``: how good a backbone is, by figures that need no download."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from cmap_defense.attacks import PGD, ThreatModel
from cmap_defense.backbones.folder import RECORD_FILE, read_record
from cmap_defense.backbones.load import entry_of
from cmap_defense.cli.figures import NEAREST, image_sheet, sample_sheet
from cmap_defense.cli.models import imported_model
from cmap_defense.cli.options import class_names_of, data_of, model_of, subset_of
from cmap_defense.cli.output import (
    checked_device,
    duration,
    print_json,
    print_table,
    using_threads,
)
from cmap_defense.cli.progress import Progress
from cmap_defense.data.files import write_image
from cmap_defense.files import write_text
from cmap_defense.quality import Quality, QualityRun
from cmap_defense.quality.report import accuracy_rows, distance_rows, notes, write_quality

__all__ = ["run_quality"]

STEPS = 20
"""Of PGD."""

SIDE = 96
"""Pixels that an image of the sheet takes up at least."""

ELSEWHERE = ("out", "as_json", "device", "threads", "max_parallel", "record")
"""Options that the figures do not hang on."""


def run_quality(
    context: click.Context,
    *,
    samples: int,
    features: str | None,
    eps: float,
    seed: int,
    record: bool,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Carry out the command; the arguments are its context and its options."""
    start = time.perf_counter()
    folder = _recorded(options["backbone"]) if record else None
    with using_threads(options["threads"]):
        model, data = model_of(options), data_of(options)
        run = QualityRun(
            model,
            data,
            name=_name(options["classifier"]),
            others=_others(options),
            subset=subset_of(options, data),
            samples=samples,
            features=features,
            attack=PGD(ThreatModel(norm="linf", eps=eps), steps=STEPS, seed=seed),
            seed=seed,
        )
        if not as_json:
            click.echo(_cost(run))
        found = _done(run)
    facts = found.to_dict()
    chosen = f"{options['data']}, {options['split']}, {subset_of(options, data).order}"
    about = {"command": _command(context), "data": chosen}
    facts |= {"data": chosen, "figures": found.figures(**about)}
    files = write_quality(facts, out)
    files.append(write_image(sample_sheet(found.samples.shown), out / "samples.png"))
    names = class_names_of(options) or run.images.class_names
    files.append(write_image(_sheet(found, names), out / "reconstructions.png"))
    if folder is not None:
        files.append(_written_down(folder, facts["figures"]))
    seconds = time.perf_counter() - start
    if as_json:
        print_json({**facts, "seconds": seconds, "files": [str(path) for path in files]})
        return
    _show(facts, seconds, files)


def _recorded(backbone: str) -> Path:
    """The backbone's folder, when it has a record that can be written; wrong usage otherwise, before any work."""
    folder = Path(backbone)
    if entry_of(backbone) is not None or not (folder / RECORD_FILE).is_file():  # a name, whatever lies here too
        raise click.BadParameter(
            f"the backbone must be a folder with a {RECORD_FILE}, but is {backbone}.", param_hint="--record"
        )
    if not os.access(folder, os.W_OK):
        raise click.BadParameter(f"{folder} cannot be written to.", param_hint="--record")
    return folder


def _name(path: str) -> str:
    """A classifier's name: what its import path ends with."""
    return path.rpartition(":")[2]


def _others(options: dict[str, Any]) -> dict[str, Any]:
    """Other classifiers by name; they take images in [0, 1]."""
    found: dict[str, Any] = {}
    for text in options["beside"]:
        name, _, rest = text.partition("=")
        path, _, file = rest.partition("@")
        if not name or not path:
            raise click.BadParameter(f"{text!r} is not NAME=PATH or NAME=PATH@WEIGHTS.", param_hint="--and")
        if name in found or name == _name(options["classifier"]):
            raise click.BadParameter(f"two classifiers are called {name!r}.", param_hint="--and")
        weights = Path(file) if file else None
        if weights is not None and not weights.is_file():
            raise click.BadParameter(f"there is no file {weights}.", param_hint="--and")
        found[name] = imported_model(path, weights, checked_device(options["device"]), "--and")
    return found


def _cost(run: QualityRun) -> str:
    """What it will cost, for people."""
    settings = run.model.settings
    speed = run.measure_speed()
    return (
        f"{run.comparison.generated} samples; {len(run.images)} images, purified clean and attacked with "
        f"K = {settings.n_latents}, N = {settings.iterations}: {run.passes:,} backbone passes, "
        f"about {duration(speed.seconds * run.passes)} here."
    )


def _done(run: QualityRun) -> Quality:
    with Progress(run.steps, "quality") as progress:
        return run.run(progress.step)


def _command(context: click.Context) -> str:
    """The command line as it was given, without what the figures do not hang on."""
    words = ["cmap-defense", "quality"]
    for option in context.command.params:
        name = option.name or ""
        if name in ELSEWHERE or context.get_parameter_source(name) != click.core.ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for single in value if isinstance(value, tuple) else [value]:
            words += [max(option.opts, key=len), _word(single)]
    return shlex.join(words)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _sheet(found: Quality, class_names: tuple[str, ...] | None) -> Image.Image:
    """The first images, each with what the classifier makes of it."""
    shown, answers = found.reconstructions.shown, found.reconstructions.predicted

    def called(label: torch.Tensor) -> str:
        return str(int(label)) if class_names is None else class_names[int(label)]

    captions = [
        [f"true: {called(found.reconstructions.labels[row])}"]
        + [f"{'bare' if kind == 'attacked' else 'vote'}: {called(answers[kind][row])}" for kind in list(shown)[1:]]
        for row in range(len(found.reconstructions.labels))
    ]
    columns = {kind.replace("_", ", "): images for kind, images in shown.items()}
    title = f"{found.attack_name}, on the bare classifier {found.classifier};\n{NEAREST}"
    return image_sheet(columns, captions, title, scale=max(1, SIDE // shown["input"].shape[-1]))


def _written_down(folder: Path, figures: dict[str, Any]) -> Path:
    """The record with these figures beside those that it has."""
    record = read_record(folder)
    changed = record.replace(figures={**record.figures, **figures})
    write_text(folder / RECORD_FILE, changed.to_json(indent=2) + "\n")
    return folder / RECORD_FILE


def _show(facts: dict[str, Any], seconds: float, files: list[Path]) -> None:
    said = notes(facts)
    click.echo()
    print_table(distance_rows(facts))
    click.echo("\n" + "\n".join([*said["samples"], "", *said["purified"], ""]))
    print_table(accuracy_rows(facts))
    click.echo("\n" + "\n".join(said["attack"]))
    click.echo(f"\n{seconds:.0f} s. {', '.join(map(str, files))}")
