"""What commands print for people: tables, durations and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click


def duration(seconds: float) -> str:
    """In minutes, or in hours where there are many."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def plural(count: int, noun: str) -> str:
    """So many of something, such as "2 runs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in aligned columns, the first row being the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *others = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return [head, "  ".join("-" * width for width in widths), *others]


def listed(files: Sequence[Path], lacking: str | None = None, missing: str = "plot") -> str:
    """The files written; what is missing for another, if anything is, goes to standard error."""
    if lacking is not None:
        click.echo(f"No {missing}: {lacking}", err=True)
    return ", ".join(map(str, files))
