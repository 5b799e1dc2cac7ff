"""What commands print: JSON for machines, tables and durations for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def duration(seconds: float) -> str:
    """In minutes, or in hours where there are many."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def print_json(value: Any) -> None:
    """One JSON object on standard output; NaN is not JSON and raises."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of text in aligned columns, the first row being the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            click.echo("  ".join("-" * width for width in widths))
