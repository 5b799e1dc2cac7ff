"""What all commands share: progress on a terminal, JSON for machines, and options that mean the same everywhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from cmap_defense.cli.paths import PathType

__all__ = [
    "checked_device",
    "duration",
    "json_option",
    "out_option",
    "print_json",
    "print_table",
    "progress",
    "steps_of",
    "writable_folder",
]


def out_option(default: str | None = None) -> Callable[[Any], Any]:
    """``-o/--out DIR``: where a command writes; required when it has no default."""
    return click.option(
        "-o",
        "--out",
        type=PathType(file_okay=False),
        default=default,
        callback=writable_folder,
        required=default is None,
        show_default=default is not None,
        help="Folder to write to; made when it is not there.",
    )


def writable_folder(context: click.Context, parameter: click.Parameter, folder: Path) -> Path:
    """``folder``, refused before any work is done when nothing can be written there."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise click.BadParameter(f"{folder} cannot be written to.", context, parameter)
    return folder


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def progress(total: int, what: str) -> tqdm[Any]:
    """A progress bar on standard error when that is a terminal, nothing otherwise."""
    return tqdm(total=total, desc=what, disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True)


def steps_of(bar: tqdm[Any]) -> Callable[[str], None]:
    """What parts of the package call as they go on: with the name of a part as it begins, with "" for one step more."""

    def step(name: str) -> None:
        if name:
            bar.set_description(name)
        else:
            bar.update()

    return step


def duration(seconds: float) -> str:
    """In minutes, or in hours where there are many."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def print_json(value: Any) -> None:
    """One JSON object on standard output; NaN is not JSON and raises."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(rows: list[list[str]]) -> None:
    """Rows of text in aligned columns, the first row being the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            click.echo("  ".join("-" * width for width in widths))


def checked_device(name: str) -> torch.device:
    """The device of that name, or wrong usage when it is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name}: {error}", param_hint="--device") from error
    return device
