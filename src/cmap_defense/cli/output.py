"""What all commands share: JSON for machines, tables for people, the device and the threads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import click
import torch

__all__ = [
    "checked_device",
    "duration",
    "print_json",
    "print_table",
    "using_threads",
]


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


@contextlib.contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """So many threads of the CPU inside; None leaves their number to torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
